// load MODEL: runs a TorchScript model with our operator in it. Nothing here names a symbol of torch_bn: the
// program works only if linking has kept the library.
#include <torch/script.h>

#include <iostream>

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  try {
    auto model = torch::jit::load(argv[1]);
    model.eval();
    const auto x = torch::arange(48, torch::kFloat).view({8, 6}).remainder(7).div(4);
    std::cout.precision(9);
    const auto y = model.forward({x}).toTensor().contiguous();
    for (int64_t i = 0; i < y.numel(); ++i) std::cout << y.data_ptr<float>()[i] << '\n';
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
