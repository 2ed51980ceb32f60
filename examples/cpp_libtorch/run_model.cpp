// run_model MODEL ROWS FEATURES: runs a model exported from Python with torch_bn's operator in it, TorchScript
// (.pt) or an AOTInductor package (.pt2), on sin(0), sin(1), ... and prints one line of results a row.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <charconv>
#include <cstring>
#include <iostream>
#include <string>

namespace {

torch::Tensor run(const std::string& path, const torch::Tensor& input) {
  if (path.ends_with(".pt2")) {
    torch::inductor::AOTIModelPackageLoader model(path);
    return model.run({input}).at(0);
  }
  auto model = torch::jit::load(path);
  model.eval();
  return model.forward({input}).toTensor();
}

// A count from 1 to a million; 0 if it is not one.
int64_t count(const char* text) {
  int64_t value = 0;
  const char* end = text + std::strlen(text);
  const auto [last, error] = std::from_chars(text, end, value);
  return error == std::errc() && last == end && value > 0 && value <= 1'000'000 ? value : 0;
}

// Errors of torch carry a trace of its calls behind their first line.
std::string first_line(const std::string& words) {
  return words.substr(0, words.find('\n'));
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t rows = argc == 4 ? count(argv[2]) : 0;
  const int64_t features = argc == 4 ? count(argv[3]) : 0;
  if (rows == 0 || features == 0) {
    std::cerr << "usage: run_model MODEL ROWS FEATURES\n";
    return 2;
  }
  try {
    const c10::InferenceMode guard;
    const auto input = torch::arange(rows * features, torch::kFloat).view({rows, features}).sin();
    const auto output = run(argv[1], input).to(torch::kFloat).contiguous();
    std::cout.precision(9);
    for (int64_t i = 0; i < output.numel(); ++i)
      std::cout << output.data_ptr<float>()[i] << ((i + 1) % output.size(1) == 0 ? '\n' : ' ');
  } catch (const std::exception& error) {
    std::cerr << "error: " << first_line(error.what()) << '\n';
    return 1;
  }
}
