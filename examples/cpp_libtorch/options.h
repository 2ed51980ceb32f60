// The command line of train_mlp.
#pragma once

#include <cstdint>
#include <string>

enum class Placement { before, after };  // of batch norm, relative to the ReLU

struct Options {
  std::string data;  // folder with MNIST's four IDX files
  std::string checkpoint = "mlp.pt";
  Placement placement = Placement::before;
  std::int64_t epochs = 10;
  std::int64_t batch_size = 64;
  std::int64_t seed = 0;
  std::int64_t threads = 0;  // torch's own choice
  double lr = 1e-3;
  bool resume = false;
  bool fault = false;
};

inline const char* name_of(Placement placement) {
  return placement == Placement::before ? "before" : "after";
}

// Throws std::invalid_argument, with one line, for what cannot be understood.
Options parse(int argc, char** argv);

// What --help prints.
extern const char* const kUsage;
