#include "decompose.h"

#include <ATen/ATen.h>
#include <ATen/FunctionalTensorWrapper.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include "checks.h"

namespace torch_bn::ops::decompose {
namespace {

// Arithmetic is in float64 as in the kernels; the results are rounded once, at the end.
at::Tensor wide(const at::Tensor& tensor) {
  return tensor.to(at::kDouble);
}

// Reductions over the rows and shapes of per-channel values, for (N, C) or (N, C, L).
class Rows {
 public:
  explicit Rows(const at::Tensor& input) : has_length_(input.dim() == 3) {}

  at::Tensor mean(const at::Tensor& values) const { return values.mean(dims(), /*keepdim=*/true); }
  // Per channel, of shape (C).
  at::Tensor sum(const at::Tensor& values) const { return values.sum(dims()); }
  // A per-channel tensor of any shape, made to broadcast against (N, C, L).
  at::Tensor spread(const at::Tensor& channels) const {
    const at::Tensor flat = wide(channels).reshape(-1).unsqueeze(0);
    return has_length_ ? flat.unsqueeze(-1) : flat;
  }
  at::Tensor flat(const at::Tensor& channels) const { return channels.reshape(-1); }

 private:
  at::IntArrayRef dims() const {
    static constexpr int64_t both[] = {0, 2};
    return {both, has_length_ ? 2u : 1u};
  }
  bool has_length_;
};

// xhat = (x - mean) * invstd, and what it is made of; broadcastable against the input.
struct Normalised {
  at::Tensor mean;
  at::Tensor var;
  at::Tensor invstd;
  at::Tensor xhat;
};

Normalised normalise_by_batch(const Rows& rows, const at::Tensor& input, double eps) {
  const at::Tensor x = wide(input);
  Normalised result;
  result.mean = rows.mean(x);
  const at::Tensor centred = x - result.mean;
  result.var = rows.mean(centred * centred);
  result.invstd = (result.var + eps).rsqrt();
  result.xhat = centred * result.invstd;
  return result;
}

Normalised normalise_by(const Rows& rows, const at::Tensor& input, const at::Tensor& mean,
                        const at::Tensor& invstd) {
  Normalised result;
  result.mean = rows.spread(mean);
  result.invstd = rows.spread(invstd);
  result.xhat = (wide(input) - result.mean) * result.invstd;
  return result;
}

Normalised normalise_for_backward(const Rows& rows, const at::Tensor& input, const at::Tensor& stats,
                                  bool training, double eps) {
  return training ? normalise_by_batch(rows, input, eps)
                  : normalise_by(rows, input, stats.select(0, 0), stats.select(0, 1));
}

at::Tensor output_of(const Rows& rows, const Normalised& normalised, const std::optional<at::Tensor>& weight,
                     const std::optional<at::Tensor>& bias) {
  at::Tensor output = normalised.xhat;
  if (is_given(weight)) output = output * rows.spread(*weight);
  if (is_given(bias)) output = output + rows.spread(*bias);
  return output;
}

// Where a ReLU whose operand was x blocks the gradient; where x is NaN it passes.
at::Tensor blocked_by_relu(const at::Tensor& x) {
  return x.detach() <= 0;
}

c10::SymInt values_per_channel(const at::Tensor& input) {
  return input.dim() == 3 ? input.sym_size(0) * input.sym_size(2) : input.sym_size(0);
}

}  // namespace

void update_running_stats(const at::Tensor& mean, const at::Tensor& var, c10::SymInt count,
                          const std::optional<at::Tensor>& running_mean,
                          const std::optional<at::Tensor>& running_var,
                          const std::optional<at::Tensor>& num_batches_tracked, std::optional<double> momentum) {
  const at::AutoGradMode no_grad(false);
  at::Tensor factor = at::scalar_tensor(momentum.value_or(0.0), mean.options());
  if (is_given(num_batches_tracked)) {
    num_batches_tracked->add_(1);
    if (!momentum) factor = wide(*num_batches_tracked).reciprocal();
  }
  auto move = [&](const std::optional<at::Tensor>& running, const at::Tensor& towards) {
    if (is_given(running)) running->copy_((1 - factor) * wide(*running) + factor * towards);
  };
  if (TORCH_GUARD_OR_FALSE(count.sym_eq(0))) return;  // no value, no change
  move(running_mean, mean);
  const at::Tensor n = at::scalar_tensor(c10::Scalar(count), mean.options());
  move(running_var, var * (n / (n - 1)));
}

// The formulas of csrc/kernels/forward.h.
OutputAndStats forward(const at::Tensor& given, const std::optional<at::Tensor>& weight,
                       const std::optional<at::Tensor>& bias, const std::optional<at::Tensor>& running_mean,
                       const std::optional<at::Tensor>& running_var,
                       const std::optional<at::Tensor>& num_batches_tracked, bool training,
                       std::optional<double> momentum, double eps, int64_t relu) {
  check_forward(given, weight, bias, running_mean, running_var, num_batches_tracked, training, eps, relu);
  const at::Tensor input = is(relu, Relu::before) ? at::relu(given) : given;
  const Rows rows(input);
  Normalised normalised;
  if (training) {
    normalised = normalise_by_batch(rows, input, eps);
    if (is_given(running_mean) || is_given(num_batches_tracked)) {
      // As one operator where transforms look at it, for they let an operator write what was captured; in its
      // parts under functionalize(), which does not let an operator write.
      const bool in_parts = at::functionalization::impl::isFunctionalTensor(input);
      const auto update = in_parts ? update_running_stats : ops::update_running_stats;
      update(rows.flat(normalised.mean).detach(), rows.flat(normalised.var).detach(), values_per_channel(input),
             running_mean, running_var, num_batches_tracked, momentum);
    }
  } else {
    normalised = normalise_by(rows, input, *running_mean, (wide(*running_var) + eps).rsqrt());
  }
  const at::Tensor output = output_of(rows, normalised, weight, bias).to(input.scalar_type());
  const at::Tensor stats = at::stack({rows.flat(normalised.mean), rows.flat(normalised.invstd)}).detach();
  return {is(relu, Relu::after) ? at::relu(output) : output, stats};
}

// The formulas of csrc/kernels/backward.h, with xhat = (x - mean) * invstd.
Gradients backward(const at::Tensor& grad_output, const at::Tensor& given, const std::optional<at::Tensor>& weight,
                   const at::Tensor& stats, bool training, double eps, OutputMask output_mask,
                   const std::optional<at::Tensor>& bias, int64_t relu) {
  check_backward(grad_output, given, weight, stats, bias, relu);
  const at::Tensor input = is(relu, Relu::before) ? at::relu(given) : given;
  const Rows rows(input);
  const Normalised by = normalise_for_backward(rows, input, stats, training, eps);
  at::Tensor g = wide(grad_output);
  if (is(relu, Relu::after))
    g = g.masked_fill(blocked_by_relu(output_of(rows, by, weight, bias).to(input.scalar_type())), 0);
  at::Tensor grad_input;
  at::Tensor grad_weight;
  at::Tensor grad_bias;
  if (output_mask[0]) {
    grad_input = training ? g - rows.mean(g) - by.xhat * rows.mean(g * by.xhat) : g;
    grad_input = grad_input * by.invstd;
    if (is_given(weight)) grad_input = grad_input * rows.spread(*weight);
    if (is(relu, Relu::before)) grad_input = grad_input.masked_fill(blocked_by_relu(given), 0);
    grad_input = grad_input.to(input.scalar_type());
  }
  const auto dtype = parameter_dtype(input, bias, weight);
  if (output_mask[1]) grad_weight = rows.sum(g * by.xhat).to(dtype);
  if (output_mask[2]) grad_bias = rows.sum(g).to(dtype);
  return {grad_input, grad_weight, grad_bias};
}

TORCH_LIBRARY_IMPL(torch_bn, CompositeExplicitAutograd, m) {
  m.impl("_update_running_stats", update_running_stats);
}

// -------------------------------------------------------------------------------------------------------------
// Let g be grad_output, r invstd, w weight, M the mean over the rows, and v_x, v_w, v_b the gradients of the
// results grad_input, grad_weight, grad_bias. The backward is linear in g through P(u) = u - M(u) - xhat M(u
// xhat), which is its own transpose and, times r, also the derivative of xhat. In training:
//
//   phi         = sum(v_x w r P(g)) + v_w sum(g xhat) + v_b sum(g)
//   d phi / d g = w r P(v_x) + v_w xhat + v_b
//   d phi / d w = r sum(v_x P(g))
//   d phi / d x = r P(h) - w r^2 xhat (M(v_x g) - M(v_x) M(g) - M(v_x xhat) M(g xhat))
//   with      h = v_w g - w r (v_x M(g xhat) + g M(v_x xhat))
//
// where the first term of d phi / d x comes through xhat and the second through r. In evaluation r and the mean
// are constants, P is the identity, and
//
//   d phi / d g = w r v_x + v_w xhat + v_b     d phi / d w = r sum(v_x g)     d phi / d x = v_w g r
// -------------------------------------------------------------------------------------------------------------
namespace {

BackwardGradients double_backward_of_norm(const Gradients& grads, const at::Tensor& grad_output,
                                          const at::Tensor& input, const at::Tensor& weight,
                                          const at::Tensor& stats, bool training, double eps) {
  const Rows rows(input);
  const Normalised by = normalise_for_backward(rows, input, stats, training, eps);
  const at::Tensor& xhat = by.xhat;
  const at::Tensor& r = by.invstd;
  const at::Tensor g = wide(grad_output);
  const at::Tensor scale = weight.defined() ? r * rows.spread(weight) : r;
  auto project = [&](const at::Tensor& u) { return training ? u - rows.mean(u) - xhat * rows.mean(u * xhat) : u; };

  at::Tensor to_g;
  at::Tensor to_x;
  at::Tensor to_w;
  auto add = [](at::Tensor& sum, const at::Tensor& term) { sum = sum.defined() ? sum + term : term; };
  const auto& [grad_of_input, grad_of_weight, grad_of_bias] = grads;
  at::Tensor h;
  if (grad_of_input.defined()) {
    const at::Tensor v = wide(grad_of_input);
    add(to_g, scale * project(v));
    if (weight.defined()) to_w = rows.sum(r * v * project(g));
    if (training) {
      const at::Tensor g_dot = rows.mean(g * xhat);
      const at::Tensor v_dot = rows.mean(v * xhat);
      h = -scale * (v * g_dot + g * v_dot);
      add(to_x, -scale * r * xhat * (rows.mean(v * g) - rows.mean(v) * rows.mean(g) - v_dot * g_dot));
    }
  }
  if (grad_of_weight.defined()) {
    const at::Tensor v = rows.spread(grad_of_weight);
    add(to_g, v * xhat);
    add(h, v * g);
  }
  if (grad_of_bias.defined()) add(to_g, rows.spread(grad_of_bias).expand_as(g));
  if (h.defined()) add(to_x, r * project(h));

  BackwardGradients result;
  if (to_g.defined()) result.grad_output = to_g.to(grad_output.scalar_type());
  if (to_x.defined()) result.input = to_x.to(input.scalar_type());
  if (to_w.defined()) result.weight = to_w.reshape(weight.sizes()).to(weight.scalar_type());
  return result;
}

// What the kernels' backward blocks because of a ReLU behind the norm: where it takes gradients of one to zero. In
// evaluation it takes them to the scale otherwise; where that is zero in the input's type, `y` must tell.
at::Tensor blocked_by_kernels(const Rows& rows, const at::Tensor& input, const at::Tensor& weight,
                              const at::Tensor& stats, bool training, double eps, const at::Tensor& bias) {
  const at::AutoGradMode no_grad(false);
  const auto optional = [](const at::Tensor& tensor) {
    return tensor.defined() ? std::optional<at::Tensor>(tensor.detach()) : std::nullopt;
  };
  const auto relu = static_cast<int64_t>(Relu::after);
  const at::Tensor x = input.detach();
  const at::Tensor scaled =
      std::get<0>(batch_norm_backward(at::ones_like(x), x, optional(weight), stats,
                                      /*training=*/false, eps, {true, false, false}, optional(bias), relu));
  at::Tensor scale = rows.spread(stats.select(0, 1));
  if (weight.defined()) scale = scale * rows.spread(weight.detach());
  const Normalised by = normalise_for_backward(rows, x, stats, training, eps);
  const at::Tensor y = output_of(rows, by, optional(weight), optional(bias)).to(x.scalar_type());
  return at::where(scale.to(x.scalar_type()) == 0, blocked_by_relu(y), scaled == 0);
}

}  // namespace

// With a ReLU behind, everything happens to g where it passes; with one before, to relu(x) and to where it passes.
BackwardGradients double_backward(const Gradients& grads, const at::Tensor& grad_output, const at::Tensor& input,
                                  const at::Tensor& weight, const at::Tensor& stats, bool training, double eps,
                                  const at::Tensor& bias, int64_t relu) {
  const auto fill = [](at::Tensor& tensor, const at::Tensor& blocked) {
    if (tensor.defined()) tensor = tensor.masked_fill(blocked, 0);
  };
  if (is(relu, Relu::after)) {
    const at::Tensor blocked = blocked_by_kernels(Rows(input), input, weight, stats, training, eps, bias);
    auto result =
        double_backward_of_norm(grads, grad_output.masked_fill(blocked, 0), input, weight, stats, training, eps);
    fill(result.grad_output, blocked);
    return result;
  }
  if (is(relu, Relu::before)) {
    const at::Tensor blocked = blocked_by_relu(input);
    Gradients passed = grads;
    fill(std::get<0>(passed), blocked);
    auto result = double_backward_of_norm(passed, grad_output, at::relu(input), weight, stats, training, eps);
    fill(result.input, blocked);
    return result;
  }
  return double_backward_of_norm(grads, grad_output, input, weight, stats, training, eps);
}

}  // namespace torch_bn::ops::decompose
