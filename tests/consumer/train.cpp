// train STATE RESULT: takes the state of a network that Python has saved, trains it for some steps on data that
// Python makes as well, and saves parameters, buffers and the output in evaluation, by name.
#include <torch/torch.h>
#include <torch_bn/torch_bn.h>

#include <fstream>
#include <iostream>
#include <iterator>

namespace {

std::vector<char> read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  TORCH_CHECK(file, "cannot read ", path);
  return {std::istreambuf_iterator<char>(file), {}};
}

void run(const char* state_path, const char* result_path) {
  torch::nn::Sequential model(torch::nn::Linear(6, 5), torch_bn::BatchNorm1d(5), torch::nn::ReLU(),
                              torch::nn::Linear(5, 3));
  // What Python's torch.save has written of a state_dict made a plain dict, the one kind that C++ reads.
  const auto state = torch::pickle_load(read(state_path)).toGenericDict();
  {
    const torch::NoGradGuard guard;
    auto load = [&](const auto& named) {
      for (const auto& item : named) item.value().copy_(state.at(item.key()).toTensor());
    };
    load(model->named_parameters());
    load(model->named_buffers());
  }
  torch::optim::SGD optimizer(model->parameters(), 0.125);
  // Exact in float32 and without a random generator, so that Python can make the same.
  const auto x = torch::arange(48, torch::kFloat).view({8, 6}).remainder(7).div(4);
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    model->forward(x + step).square().sum().backward();
    optimizer.step();
  }
  model->eval();
  c10::Dict<std::string, at::Tensor> result;
  for (const auto& item : model->named_parameters()) result.insert(item.key(), item.value().detach());
  for (const auto& item : model->named_buffers()) result.insert(item.key(), item.value());
  result.insert("output", model->forward(x).detach());
  const auto bytes = torch::pickle_save(result);
  std::ofstream(result_path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  std::cout << model << '\n';
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  try {
    run(argv[1], argv[2]);
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
