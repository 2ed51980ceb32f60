// Trains an MLP on MNIST with torch_bn::BatchNorm1d, beside a proof that the layer computes the right thing.
#include <torch/torch.h>
#include <torch_bn/torch_bn.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <filesystem>
#include <iostream>

#include "data.h"
#include "model.h"
#include "options.h"
#include "step_proof.h"

namespace {

enum Exit { kPassed = 0, kFailed = 1, kUnusable = 2, kInterrupted = 130 };

volatile std::sig_atomic_t interrupted = 0;

// Mean loss and accuracy in evaluation mode.
std::pair<double, double> evaluate(Mlp& model, const Split& split) {
  const torch::NoGradGuard guard;
  model.eval();
  const auto logits = model.forward(split.inputs);
  model.train();
  return {torch::nn::functional::cross_entropy(logits, split.labels).item<double>(),
          (logits.argmax(1) == split.labels).to(torch::kDouble).mean().item<double>()};
}

class Training {
 public:
  Training(const Options& options, const Dataset& data)
      : options_(options),
        data_(data),
        batches_(data.train, options.batch_size, options.seed),
        model_(data.train.inputs.size(1), options.placement, Mlp::Norm::ours, options.seed),
        optimizer_(model_.parameters(), options.lr),
        proof_(data.train.inputs.size(1), options.placement) {
    if (options.fault)
      for (const auto& child : model_.children())
        if (auto* layer = child->as<torch_bn::BatchNorm1d>()) layer->options.eps(2e-5);
  }

  int run() {
    const int64_t total = options_.epochs * batches_.per_epoch();
    while (step_ < total) {
      if (interrupted != 0) {
        save();
        std::cout << "\nInterrupted, state saved in " << options_.checkpoint << ": continue with --resume.\n";
        return kInterrupted;
      }
      advance();
      show_progress(total);
      if (step_ % batches_.per_epoch() == 0) end_epoch();
    }
    const auto [loss, accuracy] = evaluate(model_, data_.test);
    std::printf("test: loss %.4f  accuracy %.2f%%\n\n", loss, 100 * accuracy);
    const bool passed = proof_.report(std::cout);
    std::cout << (passed ? "\nThe proof passed.\n" : "\nThe proof FAILED.\n");
    return passed ? kPassed : kFailed;
  }

  // To a file beside it, then renamed: an interruption leaves the old one or the new one.
  void save() const {
    torch::serialize::OutputArchive archive;
    torch::serialize::OutputArchive model;
    torch::serialize::OutputArchive optimizer;
    torch::serialize::OutputArchive proof;
    model_.save(model);
    optimizer_.save(optimizer);
    proof_.save(proof);
    archive.write("model", model);
    archive.write("optimizer", optimizer);
    archive.write("proof", proof);
    archive.write("step", step_);
    archive.write("settings", settings());
    archive.write("tally", torch::tensor({loss_, correct_, rows_}, torch::kDouble));
    const std::string part = options_.checkpoint + ".part";
    archive.save_to(part);
    std::filesystem::rename(part, options_.checkpoint);
  }

  void load() {
    torch::serialize::InputArchive archive;
    archive.load_from(options_.checkpoint);
    c10::IValue value;
    archive.read("settings", value);
    TORCH_CHECK(value.toStringRef() == settings(), options_.checkpoint, " is of a run with other settings (",
                value.toStringRef(), "; this one: ", settings(), ")");
    torch::serialize::InputArchive part;
    archive.read("model", part);
    model_.load(part);
    archive.read("optimizer", part);
    optimizer_.load(part);
    archive.read("proof", part);
    proof_.load(part);
    archive.read("step", value);
    step_ = value.toInt();
    torch::Tensor tally;
    archive.read("tally", tally);
    loss_ = tally[0].item<double>();
    correct_ = tally[1].item<double>();
    rows_ = tally[2].item<double>();
    std::cout << "Resumed from " << options_.checkpoint << ": " << step_ << " steps are done.\n";
  }

 private:
  // Whatever changes the figures, but for the number of epochs: a finished run may be given more.
  std::string settings() const {
    std::ostringstream text;
    text.precision(17);
    text << "placement " << name_of(options_.placement) << ", batch size " << options_.batch_size << ", lr "
         << options_.lr << ", seed " << options_.seed << ", threads " << at::get_num_threads() << ", images "
         << data_.train.labels.size(0) << ", checksum " << std::hex << data_.checksum << std::dec << ", fault "
         << options_.fault;
    return text.str();
  }

  void advance() {
    const auto [x, y] = batches_.at(step_);
    const auto [logits, loss] = StepProof::is_due(step_) ? proof_.check(model_, x, y) : gradients(model_, x, y);
    optimizer_.step();
    const auto rows = static_cast<double>(y.size(0));
    loss_ += loss.item<double>() * rows;
    correct_ += (logits.argmax(1) == y).sum().item<double>();
    rows_ += rows;
    ++step_;
  }

  void show_progress(int64_t total) const {
    if (isatty(STDOUT_FILENO) == 0 || step_ % 20 != 0) return;
    std::printf("\rstep %lld of %lld  loss %.4f ", static_cast<long long>(step_), static_cast<long long>(total),
                loss_ / rows_);
    std::fflush(stdout);
  }

  void end_epoch() {
    const auto [loss, accuracy] = evaluate(model_, data_.validation);
    std::printf("%sepoch %lld/%lld  loss %.4f  accuracy %.2f%%  validation %.4f %.2f%%\n",
                isatty(STDOUT_FILENO) != 0 ? "\r" : "", static_cast<long long>(step_ / batches_.per_epoch()),
                static_cast<long long>(options_.epochs), loss_ / rows_, 100 * correct_ / rows_, loss,
                100 * accuracy);
    std::fflush(stdout);
    loss_ = correct_ = rows_ = 0;
    save();
  }

  const Options& options_;
  const Dataset& data_;
  Batches batches_;
  Mlp model_;
  torch::optim::Adam optimizer_;
  StepProof proof_;
  int64_t step_ = 0;
  double loss_ = 0;  // of the epoch so far: sums over its rows
  double correct_ = 0;
  double rows_ = 0;
};

int run(const Options& options) {
  if (options.threads > 0) at::set_num_threads(static_cast<int>(options.threads));
  const Dataset data = load_mnist(options.data);
  Training training(options, data);
  const auto info = torch_bn::build_info();
  std::cout << "torch_bn " << info.version << " (" << info.isa << ") with torch " << TORCH_VERSION << ", "
            << data.train.labels.size(0) << " training images, batch norm " << name_of(options.placement)
            << " the ReLU\n";
  if (options.resume) training.load();
  std::signal(SIGINT, [](int) { interrupted = 1; });
  std::signal(SIGTERM, [](int) { interrupted = 1; });
  return training.run();
}

}  // namespace

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i)
    if (std::string(argv[i]) == "--help") {
      std::cout << kUsage;
      return kPassed;
    }
  try {
    return run(parse(argc, argv));
  } catch (const c10::Error& error) {
    std::cerr << "error: " << error.what_without_backtrace() << '\n';
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
  }
  return kUnusable;
}
