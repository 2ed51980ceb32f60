#include "options.h"

#include <cmath>
#include <cstdlib>
#include <stdexcept>

const char* const kUsage =
    "usage: train_mlp [options]\n"
    "\n"
    "Trains an MLP on MNIST with torch_bn::BatchNorm1d, and proves at many steps, beside\n"
    "torch::nn::BatchNorm1d and against float64, that it computes the right thing.\n"
    "\n"
    "  --data DIR            folder with MNIST's four IDX files, plain or .gz (default: $TORCH_BN_MNIST)\n"
    "  --placement WHERE     batch norm before or after the ReLU (default: before)\n"
    "  --epochs N            passes over the training images (default: 10)\n"
    "  --batch-size N        rows in a batch, at least 2 (default: 64)\n"
    "  --lr RATE             Adam's learning rate (default: 0.001)\n"
    "  --seed N              of initial weights and batches (default: 0)\n"
    "  --threads N           CPU threads (default: torch's own choice)\n"
    "  --checkpoint FILE     where the state is kept, once an epoch and when interrupted (default: mlp.pt)\n"
    "  --resume              go on from the checkpoint, to the same bits as without the interruption\n"
    "  --fault               double the layer's eps, to see the proof fail\n"
    "\n"
    "Exit status: 0 the proof passed, 1 it failed, 2 wrong usage or data, 130 interrupted.\n";

namespace {

std::int64_t whole(const std::string& name, const std::string& text, std::int64_t low, std::int64_t high) {
  char* end = nullptr;
  const long long value = std::strtoll(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || value < low || value > high)
    throw std::invalid_argument(name + " takes a whole number from " + std::to_string(low) + " to " +
                                std::to_string(high) + ", not '" + text + "'");
  return value;
}

double rate(const std::string& name, const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !std::isfinite(value) || value <= 0)
    throw std::invalid_argument(name + " takes a positive number, not '" + text + "'");
  return value;
}

Placement placement(const std::string& text) {
  if (text == "before") return Placement::before;
  if (text == "after") return Placement::after;
  throw std::invalid_argument("--placement takes 'before' or 'after', not '" + text + "'");
}

}  // namespace

Options parse(int argc, char** argv) {
  Options options;
  if (const char* folder = std::getenv("TORCH_BN_MNIST")) options.data = folder;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name == "--resume" || name == "--fault") {
      (name == "--resume" ? options.resume : options.fault) = true;
      continue;
    }
    if (i + 1 == argc) throw std::invalid_argument("unknown option, or one without its value: " + name);
    const std::string value = argv[++i];
    if (name == "--data") {
      options.data = value;
    } else if (name == "--placement") {
      options.placement = placement(value);
    } else if (name == "--epochs") {
      options.epochs = whole(name, value, 1, 100'000);
    } else if (name == "--batch-size") {
      options.batch_size = whole(name, value, 2, 1 << 20);  // one row has no variance
    } else if (name == "--lr") {
      options.lr = rate(name, value);
    } else if (name == "--seed") {
      options.seed = whole(name, value, 0, 1 << 20);
    } else if (name == "--threads") {
      options.threads = whole(name, value, 1, 1024);
    } else if (name == "--checkpoint") {
      options.checkpoint = value;
    } else {
      throw std::invalid_argument("unknown option " + name);
    }
  }
  if (options.data.empty()) throw std::invalid_argument("no data: name MNIST's folder with --data DIR");
  return options;
}
