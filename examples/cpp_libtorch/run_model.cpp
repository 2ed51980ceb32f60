// run_model MODEL ROWS FEATURES: runs a model exported from Python with torch_bn's operator in it, TorchScript
// (.pt) or an AOTInductor package (.pt2), on sin(0), sin(1), ... and prints one line of results a row.
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <iostream>

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

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) {
    std::cerr << "usage: run_model MODEL ROWS FEATURES\n";
    return 2;
  }
  try {
    const c10::InferenceMode guard;
    const int64_t rows = std::stoll(argv[2]);
    const int64_t features = std::stoll(argv[3]);
    const auto input = torch::arange(rows * features, torch::kFloat).view({rows, features}).sin();
    const auto output = run(argv[1], input).contiguous();
    std::cout.precision(9);
    for (int64_t i = 0; i < output.numel(); ++i)
      std::cout << output.data_ptr<float>()[i] << ((i + 1) % output.size(1) == 0 ? '\n' : ' ');
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
}
