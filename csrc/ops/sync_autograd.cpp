// The synchronised layer as one differentiable operator. Weight and bias get the gradients of the local rows, as
// DistributedDataParallel expects: it averages them over the processes.
#include <ATen/ops/mul.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <sstream>

#include "checks.h"
#include "recording.h"
#include "sync.h"

namespace torch_bn::ops::sync {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

namespace {

// What takes no part in differentiation, passed beside the variables.
struct Layer {
  const std::optional<at::Tensor>& running_mean;
  const std::optional<at::Tensor>& running_var;
  const std::optional<at::Tensor>& num_batches_tracked;
  std::optional<double> momentum;
  double eps;
  std::string group;
  int64_t processes;
  std::string name;
  int64_t mark;
  int64_t relu;
};

OutputAndStats forward_below(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                             const std::optional<at::Tensor>& bias, const Layer& layer) {
  at::AutoDispatchBelowAutograd guard;
  const at::Tensor parts =
      all_gather(moments(input, layer.mark, layer.relu), layer.processes, layer.group, layer.name, "forward");
  return normalise(input, parts, weight, bias, layer.running_mean, layer.running_var, layer.num_batches_tracked,
                   layer.momentum, layer.eps, layer.name, layer.relu);
}

struct BackwardOptions {
  const std::optional<at::Tensor>& bias;  // given where a ReLU comes after
  const at::Tensor& stats;
  std::string group;
  int64_t processes;
  std::string name;
  int64_t mark;
  int64_t relu;
  OutputMask mask;
};

Gradients backward_below(const at::Tensor& grad_output, const at::Tensor& input,
                         const std::optional<at::Tensor>& weight, const BackwardOptions& options) {
  at::AutoDispatchBelowAutograd guard;
  const at::Tensor part =
      gradient_sums(grad_output, input, weight, options.bias, options.stats, options.mark, options.relu);
  const c10::SymInt channels = input.sym_size(1);
  const auto values = [&](int which) { return part.narrow_symint(0, 2 + which * channels, channels); };
  const auto dtype = parameter_dtype(input, weight);
  Gradients result;
  auto& [grad_input, grad_weight, grad_bias] = result;
  if (options.mask[1])
    grad_weight = at::mul(values(1), options.stats.narrow_symint(0, channels, channels)).to(dtype);
  if (options.mask[2]) grad_bias = values(0).to(dtype, /*non_blocking=*/false, /*copy=*/true);
  if (options.mask[0])
    grad_input = gradient(grad_output, input, weight, options.bias, options.stats,
                          all_gather(part, options.processes, options.group, options.name, "backward"),
                          options.name, options.relu);
  return result;
}

// Without the check a tangent would be dropped in silence wherever nothing is recorded.
template <typename... Tensors>
void check_transforms(const std::string& name, const Tensors&... tensors) {
  TORCH_CHECK_NOT_IMPLEMENTED(!needs_decomposition(tensors...), name_of(name),
                              " serves neither the transforms of torch.func nor forward-mode AD");
}

// FNV-1a, in so many bits as a double holds exactly.
int64_t mark_of(const std::string& settings) {
  std::uint64_t hash = 14695981039346656037u;
  for (const char c : settings) hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211u;
  return static_cast<int64_t>((hash ^ (hash >> 53)) & ((std::uint64_t{1} << 53) - 1));
}

}  // namespace

// The names of these two structs are what users see in a result's grad_fn.

struct SyncBatchNormBackward : Function<SyncBatchNormBackward> {
  static constexpr bool is_traceable = true;

  // Returns the gradients that the mask asks for, and no others, in order.
  static variable_list forward(AutogradContext* ctx, const at::Tensor& grad_output, const at::Tensor& input,
                               const std::optional<at::Tensor>& weight, const BackwardOptions& options) {
    ctx->saved_data["name"] = options.name;
    const Gradients gradients = backward_below(grad_output, input, weight, options);
    return asked_for(gradients);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& /*grads*/) {
    TORCH_CHECK_NOT_IMPLEMENTED(false, name_of(ctx->saved_data["name"].toStringRef()),
                                " has no second derivative: its gradient cannot be differentiated again");
  }
};

struct SyncBatchNorm : Function<SyncBatchNorm> {
  static constexpr bool is_traceable = true;  // compiled autograd may look into the backward

  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& input, const std::optional<at::Tensor>& weight,
                            const std::optional<at::Tensor>& bias, const Layer& layer) {
    auto [output, stats] = forward_below(input, weight, bias, layer);
    const bool masks = is(layer.relu, Relu::after);
    ctx->save_for_backward(
        {input, tensor_or_undefined(weight), stats, masks ? tensor_or_undefined(bias) : at::Tensor()});
    ctx->saved_data["group"] = layer.group;
    ctx->saved_data["processes"] = layer.processes;
    ctx->saved_data["name"] = layer.name;
    ctx->saved_data["mark"] = layer.mark;
    ctx->saved_data["relu"] = layer.relu;
    if (is_given(bias)) ctx->saved_data["bias_sizes"] = bias->sym_sizes();
    return output;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor& input = saved[0];
    const at::Tensor& weight = saved[1];
    const auto bias_sizes = entry_of(*ctx, "bias_sizes");
    const OutputMask mask = wanted(*ctx, weight.defined(), !bias_sizes.isNone());
    const auto bias = optional_of(saved[3]);
    const BackwardOptions options{bias,
                                  saved[2],
                                  ctx->saved_data["group"].toStringRef(),
                                  ctx->saved_data["processes"].toInt(),
                                  ctx->saved_data["name"].toStringRef(),
                                  -ctx->saved_data["mark"].toInt(),  // the other direction
                                  ctx->saved_data["relu"].toInt(),
                                  mask};
    check_transforms(options.name, grads[0], input, optional_of(weight));
    Gradients gradients;
    if (needs_recording(grads[0], input, optional_of(weight))) {
      const auto results = SyncBatchNormBackward::apply(grads[0], input, optional_of(weight), options);
      gradients = by_mask(mask, results);
    } else {
      gradients = backward_below(grads[0], input, optional_of(weight), options);
    }
    reshape_parameters(gradients, mask, weight, bias_sizes);
    auto& [grad_input, grad_weight, grad_bias] = gradients;
    return {grad_input, grad_weight, grad_bias, {}};
  }
};

namespace {

at::Tensor batch_norm_composite(const at::Tensor& input, const std::optional<at::Tensor>& weight,
                                const std::optional<at::Tensor>& bias,
                                const std::optional<at::Tensor>& running_mean,
                                const std::optional<at::Tensor>& running_var,
                                const std::optional<at::Tensor>& num_batches_tracked,
                                std::optional<double> momentum, double eps, c10::string_view group,
                                int64_t processes, c10::string_view layer_name, bool agree, int64_t relu) {
  check_relu(relu);
  const std::string name(layer_name);
  check_transforms(name, input, weight, bias);
  const bool recorded = at::GradMode::is_enabled();
  std::ostringstream settings;
  settings.precision(17);
  settings << "layer '" << name << "', " << (input.dim() > 1 ? input.sym_size(1) : c10::SymInt(0)) << " channels, "
           << input.scalar_type() << " input, " << parameter_dtype(input, running_mean, bias, weight)
           << " parameters, momentum ";
  momentum ? settings << *momentum : settings << "None";
  settings << ", eps " << eps << ", input gradient "
           << (recorded && input.requires_grad() ? "needed" : "not needed");
  if (!is(relu, Relu::none)) settings << ", ReLU " << (is(relu, Relu::after) ? "after" : "before");
  // Before any check of this process alone: what it would refuse then, all refuse together.
  if (agree) agree_on(settings.str(), std::string(group), name);
  check_forward_but_rows(input, weight, bias, running_mean, running_var, num_batches_tracked, /*training=*/true,
                         eps);
  check_statistics_need_no_grad(running_mean, running_var);
  const Layer layer{running_mean, running_var, num_batches_tracked,     momentum, eps, std::string(group),
                    processes,    name,        mark_of(settings.str()), relu};
  if (needs_recording(input, weight, bias)) return SyncBatchNorm::apply(input, weight, bias, layer);
  return std::get<0>(forward_below(input, weight, bias, layer));
}

OutputAndStats normalise_in_place(const at::Tensor& input, const at::Tensor& parts,
                                  const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& bias,
                                  const std::optional<at::Tensor>& running_mean,
                                  const std::optional<at::Tensor>& running_var,
                                  const std::optional<at::Tensor>& num_batches_tracked,
                                  std::optional<double> momentum, double eps, c10::string_view layer,
                                  int64_t relu) {
  OutputAndStats result;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    result = normalise(input, parts, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps,
                       layer, relu);
  }
  bump_versions({&running_mean, &running_var, &num_batches_tracked});
  return result;
}

TORCH_LIBRARY_IMPL(torch_bn, CompositeImplicitAutograd, m) {
  m.impl("sync_batch_norm", batch_norm_composite);
}

TORCH_LIBRARY_IMPL(torch_bn, ADInplaceOrView, m) {
  m.impl("_sync_moments", torch::CppFunction::makeFallthrough());
  m.impl("_sync_normalise", normalise_in_place);
  m.impl("_sync_gradient_sums", torch::CppFunction::makeFallthrough());
  m.impl("_sync_gradient", torch::CppFunction::makeFallthrough());
}

}  // namespace
}  // namespace torch_bn::ops::sync
