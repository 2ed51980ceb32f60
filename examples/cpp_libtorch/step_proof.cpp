#include "step_proof.h"

#include <torch/torch.h>

#include <cmath>
#include <cstdio>
#include <limits>
#include <ostream>

namespace {

constexpr double kEps = std::numeric_limits<float>::epsilon();
constexpr double kStepFactor = 2.0;
constexpr double kStepAllowance = 64 * kEps;
constexpr double kMeanFactor = 1.1;
constexpr double kMeanAllowance = 2 * kEps;

using Figures = std::map<std::string, torch::Tensor>;
using Scales = std::map<std::string, double>;

struct Observation {
  torch::Tensor logits;
  torch::Tensor loss;
  Figures figures;  // all that is compared
  std::vector<int64_t> counters;
  Trace trace;

  Masks masks() const {
    Masks result;
    for (const auto& [name, input] : trace.input)
      if (name.starts_with("relu")) result[name] = input.detach() > 0;
    return result;
  }
};

Observation observe(Mlp& model, const torch::Tensor& x, const torch::Tensor& y, const Masks* masks = nullptr) {
  Observation seen;
  std::tie(seen.logits, seen.loss) = gradients(model, x, y, &seen.trace, masks);
  seen.figures = {{"logits", seen.logits}, {"loss", seen.loss}};
  for (const auto& item : model.named_parameters()) seen.figures[item.key() + " gradient"] = item.value().grad();
  for (const auto& [name, input] : seen.trace.input)
    if (name.starts_with("bn")) seen.figures[name + ".input gradient"] = input.grad();
  for (const auto& item : model.named_buffers()) {
    if (item.key().ends_with("num_batches_tracked")) {
      seen.counters.push_back(item.value().item<int64_t>());
    } else {
      seen.figures[item.key()] = item.value().clone();
    }
  }
  const torch::NoGradGuard guard;
  model.eval();
  seen.figures["logits in evaluation"] = model.forward(x);
  model.train();
  return seen;
}

double largest(const torch::Tensor& tensor) {
  return tensor.abs().max().item<double>();
}

// Of the terms (N, C) of a sum over N: the largest channel's root of the sum of squares.
double root_of_squares(const torch::Tensor& terms) {
  return std::sqrt(largest(terms.square().sum(0)));
}

// What the error of each figure is measured by: its largest value, unless that may cancel. The loss is a
// difference of logits. The gradient of a batch norm's input is measured by the first of its three terms, the
// gradient of a parameter by the root of the sum of its squared terms.
Scales scales_of(const Mlp& exact, const Observation& seen, Placement placement, const Masks& masks) {
  Scales scales;
  for (const auto& [name, figure] : seen.figures) scales[name] = largest(figure);
  scales["loss"] = scales["logits"];
  std::map<std::string, torch::Tensor> terms;  // of the gradients of Dense, by layer
  const Trace& trace = seen.trace;
  for (const auto& [name, output] : trace.output)
    if (name.starts_with("dense")) terms[name] = output.grad();
  const auto parameters = exact.named_parameters();
  for (const auto& [name, input] : trace.input) {
    if (!name.starts_with("bn")) continue;
    const auto x = input.detach();
    const auto grad = trace.output.at(name).grad();
    const auto invstd = (x.var(0, /*unbiased=*/false) + 1e-5).rsqrt();
    const auto normalised = (x - x.mean(0)) * invstd;
    const auto factor = parameters[name + ".weight"].detach() * invstd;
    scales[name + ".weight gradient"] = root_of_squares(grad * normalised);
    scales[name + ".bias gradient"] = root_of_squares(grad);
    scales[name + ".input gradient"] = largest(factor * grad);
    const auto size = grad.abs() + grad.abs().mean(0) + normalised.abs() * (grad * normalised).abs().mean(0);
    const std::string number = name.substr(2);
    auto& below = terms["dense" + number];
    below = factor * size;
    if (placement == Placement::after) below = below * masks.at("relu" + number);
  }
  for (const auto& [name, term] : terms) {
    const auto squares = term.square().t().matmul(trace.input.at(name).detach().square());
    scales[name + ".weight gradient"] = std::sqrt(largest(squares));
    scales[name + ".bias gradient"] = root_of_squares(term);
  }
  return scales;
}

// The error of every figure, and of the masks that float64 was given: the largest pre-activation on the wrong
// side.
std::map<std::string, double> errors_of(const Observation& seen, const Observation& exact, const Scales& scales) {
  std::map<std::string, double> errors;
  const auto measure = [&](const std::string& name, double difference, double scale) {
    // A difference where there is nothing to measure it by is wrong without bound.
    errors[name] = scale > 0 ? difference / scale : (difference == 0 ? 0.0 : INFINITY);
  };
  for (const auto& [name, figure] : seen.figures)
    measure(name, largest(figure.to(torch::kDouble) - exact.figures.at(name)), scales.at(name));
  for (const auto& [name, mask] : seen.masks()) {
    const auto x = exact.trace.input.at(name).detach();
    measure(name + " mask", largest(x * (mask != (x > 0))), largest(x));
  }
  return errors;
}

bool same_masks(const Masks& a, const Masks& b) {
  for (const auto& [name, mask] : a)
    if (!torch::equal(mask, b.at(name))) return false;
  return true;
}

}  // namespace

std::pair<torch::Tensor, torch::Tensor> gradients(Mlp& model, const torch::Tensor& x, const torch::Tensor& y,
                                                  Trace* trace, const Masks* masks) {
  model.zero_grad();
  const auto logits = model.forward(x, trace, masks);
  const auto loss = torch::nn::functional::cross_entropy(logits, y);
  loss.backward();
  return {logits.detach(), loss.detach()};
}

StepProof::StepProof(int64_t features, Placement placement)
    : builtin_(features, placement, Mlp::Norm::builtin, 0),
      exact_(features, placement, Mlp::Norm::builtin, 0),
      placement_(placement) {
  exact_.to(torch::kDouble);
}

std::pair<torch::Tensor, torch::Tensor> StepProof::check(Mlp& model, const torch::Tensor& x,
                                                         const torch::Tensor& y) {
  Mlp before(x.size(1), placement_, Mlp::Norm::builtin, 0);  // training and evaluation are to begin from one state
  copy_state(model, before);
  copy_state(model, builtin_);
  const auto ours = observe(model, x, y);
  const auto builtin = observe(builtin_, x, y);
  const auto judge = [&](const Observation& seen) {
    const Masks masks = seen.masks();
    copy_state(before, exact_);
    auto exact = observe(exact_, x.to(torch::kDouble), y, &masks);
    const auto scales = scales_of(exact_, exact, placement_, masks);
    return std::pair(std::move(exact), scales);
  };
  auto [exact, scales] = judge(ours);
  const auto our_errors = errors_of(ours, exact, scales);
  if (ours.counters != builtin.counters || ours.counters != exact.counters) ++wrong_counters_;
  if (!same_masks(ours.masks(), builtin.masks())) std::tie(exact, scales) = judge(builtin);
  const auto their_errors = errors_of(builtin, exact, scales);

  names_.clear();
  std::vector<double> row;
  for (const auto& [name, error] : our_errors) {
    names_.push_back(name);
    row.insert(row.end(), {error, their_errors.at(name)});
  }
  const auto added = torch::tensor(row, torch::kDouble).view({1, -1, 2});
  errors_ = errors_.defined() ? torch::cat({errors_, added}) : added;
  return {ours.logits, ours.loss};
}

bool StepProof::report(std::ostream& out) const {
  if (!errors_.defined()) {
    out << "No step was compared.\n";
    return false;
  }
  bool all = wrong_counters_ == 0;
  char line[160];
  const auto print = [&](const std::string& name, double ours, double builtin, double bound, bool good) {
    std::snprintf(line, sizeof(line), " %-34s %9.1e %9.1e %9.1e   %s\n", name.c_str(), ours, builtin, bound,
                  good ? "PASS" : "FAIL");
    out << line;
    all = all && good;
  };
  std::snprintf(line, sizeof(line), " %-34s %9s %9s %9s   %s\n", "errors against float64", "ours", "torch",
                "bound", "verdict");
  out << line;
  const auto ours = errors_.select(2, 0);
  const auto builtin = errors_.select(2, 1);
  const auto bounds = kStepFactor * builtin + kStepAllowance;
  for (std::size_t i = 0; i < names_.size(); ++i) {
    const auto column = static_cast<int64_t>(i);
    const auto at = [&](const torch::Tensor& of, int64_t row) { return of[row][column].item<double>(); };
    // A NaN counts as the worst; `<=` so that it fails.
    const auto share = (ours / bounds).select(1, column).nan_to_num(INFINITY, INFINITY);
    const int64_t worst = share.argmax().item<int64_t>();
    print(names_[i] + ", worst", at(ours, worst), at(builtin, worst), at(bounds, worst),
          at(ours, worst) <= at(bounds, worst));
    const double mean = ours.select(1, column).mean().item<double>();
    const double their_mean = builtin.select(1, column).mean().item<double>();
    const double bound = kMeanFactor * their_mean + kMeanAllowance;
    print(names_[i] + ", mean", mean, their_mean, bound, mean <= bound);
  }
  std::snprintf(line, sizeof(line), " %-34s %lld wrong of %lld steps   %s\n", "num_batches_tracked",
                static_cast<long long>(wrong_counters_), static_cast<long long>(errors_.size(0)),
                wrong_counters_ == 0 ? "PASS" : "FAIL");
  out << line;
  return all;
}

void StepProof::save(torch::serialize::OutputArchive& archive) const {
  c10::List<std::string> names;
  for (const auto& name : names_) names.push_back(name);
  archive.write("names", names);
  archive.write("wrong_counters", wrong_counters_);
  if (errors_.defined()) archive.write("errors", errors_);
}

void StepProof::load(torch::serialize::InputArchive& archive) {
  c10::IValue value;
  archive.read("names", value);
  names_.clear();
  for (const auto& name : value.toListRef()) names_.push_back(name.toStringRef());
  archive.read("wrong_counters", value);
  wrong_counters_ = value.toInt();
  errors_ = torch::Tensor();
  archive.try_read("errors", errors_);
}
