// The phases of forward.h and backward.h apart from each other, for a batch that lies in several processes.
#pragma once

#include "backward.h"
#include "forward.h"
#include "sync_api.h"
#include "types.h"

namespace torch_bn::kernels {
namespace {

// Calls sum(segment, tile) for every segment and tile, then finish(channels), on a team.
template <typename Sum, typename Finish>
void sum_on_team(int threads, const Partition& partition, i64 channels, i64 widest, Sum sum, Finish finish) {
  run_team(threads, partition.rows * channels, [&](const Team& team) {
    share_segments(team, partition, channels, tile_for(partition, channels, widest, team.size()), sum);
    team.barrier();
    finish(share_of_channels(team, channels));
  });
}

template <typename Element, Relu kRelu>
void local_moments(const ForwardArgs& args, double* mean, double* m2) {
  const Partition partition(args.shape, sums_run_along_lines(args.shape, args.input));
  const Partials partials = forward_partials<Element>(args, nullptr);
  sum_on_team(
      args.threads, partition, args.shape.c, widest_tile<Element>(&args.input, 1, args.shape, partition),
      [&](i64 segment, Range tile) { moments_of<Element, kRelu>(args, partition, partials, segment, tile); },
      [&](Range channels) {
        merge_segments<Element>(partition, partials, channels);
        const Partial whole = partial_of<Element>(partials, 0);
        for (i64 c = channels.begin; c < channels.end; ++c) {
          mean[c] = whole.mean[c];
          m2[c] = whole.m2[c];
        }
      });
}

// Merges the processes' moments of some channels one after the other, so that every process gets the same bits.
// Those without rows take no part: the moments of one process stay as they are. Returns the number of all rows.
inline double merge_parts(const Parts& parts, Range channels, double* mean, double* m2) {
  i64 rows = 0;
  for (i64 p = 0; p < parts.processes; ++p) {
    const i64 own = static_cast<i64>(parts.count[p * parts.stride]);
    if (own == 0) continue;
    const double* part_mean = parts.mean + p * parts.stride;
    const double* part_m2 = parts.m2 + p * parts.stride;
    if (rows == 0) {
      for (i64 c = channels.begin; c < channels.end; ++c) {
        mean[c] = part_mean[c];
        m2[c] = part_m2[c];
      }
    } else {
      const Merge merge(rows, own);
      for (i64 c = channels.begin; c < channels.end; ++c) merge(mean[c], m2[c], part_mean[c], part_m2[c]);
    }
    rows += own;
  }
  return static_cast<double>(rows);
}

template <typename Element, typename Param, Relu kRelu>
void normalise_by_parts(const ForwardArgs& args, const Parts& parts) {
  const Shape& shape = args.shape;
  const Partition partition(shape, sums_run_along_lines(shape, args.input));
  const Coefficients of = forward_coefficients(args);
  const auto op = normalisation<Element, kRelu>(args, of);
  const i64 elements = partition.rows * shape.c;
  const i64 units = units_of(shape);
  run_team(args.threads, elements, [&](const Team& team) {
    const Range own = share_of_channels(team, shape.c);
    double* m2 = args.scratch + shape.c;
    const double rows = merge_parts(parts, own, args.scratch, m2);
    finish_statistics<Param>(args, args.scratch, m2, rows, own);
    set_coefficients<Element, Param>(args, of, own);
    team.barrier();
    if (elements > 0)
      for_each_element<Element>(op, shape, team.share(units), Range{0, shape.c}, args.output, args.input);
  });
}

template <typename Element, typename Param, Relu kRelu>
void local_gradient_sums(const BackwardArgs& args, double* total, double* dot) {
  const Partition partition(args.shape, sums_run_along_lines(args.shape, args.input));
  const Partials partials = backward_partials(args, nullptr);
  sum_on_team(
      args.threads, partition, args.shape.c, widest_tile<Element>(args, partition),
      [&](i64 segment, Range tile) {
        gradient_sums<Element, Param, kRelu>(args, partition, partials, segment, tile);
      },
      [&](Range channels) {
        merge_gradient_sums(partition, partials, channels);
        for (i64 c = channels.begin; c < channels.end; ++c) {
          total[c] = args.scratch[c];
          dot[c] = args.scratch[args.shape.c + c];
        }
      });
}

// Adds the processes' sums of some channels in the order of their ranks, so that every process gets the same bits.
inline void add_parts(const PartialSums& sums, Range channels, const double* parts, double* sum) {
  for (i64 c = channels.begin; c < channels.end; ++c) sum[c] = parts[c];
  for (i64 p = 1; p < sums.processes; ++p)
    for (i64 c = channels.begin; c < channels.end; ++c) sum[c] += parts[p * sums.stride + c];
}

template <typename Element, typename Param, Relu kRelu>
void gradient_by_sums(const BackwardArgs& args, const PartialSums& sums) {
  const Shape& shape = args.shape;
  Partition partition(shape, sums_run_along_lines(shape, args.input));
  const i64 elements = partition.rows * shape.c;
  // As if one segment held the sums of all processes' rows.
  partition.segments = 1;
  partition.rows = static_cast<i64>(sums.rows);
  const BackwardScratch scratch(args);
  const bool stream = streams_grad_input<Element>(args);
  const i64 units = units_of(shape);
  run_team(args.threads, elements, [&](const Team& team) {
    const Range own = share_of_channels(team, shape.c);
    add_parts(sums, own, sums.total, args.scratch);
    add_parts(sums, own, sums.dot, args.scratch + shape.c);
    finish_gradients<Element, Param, kRelu>(args, partition, backward_partials(args, nullptr), scratch,
                                            /*has_sums=*/true, own);
    team.barrier();
    write_grad_input<Element, kRelu>(args, scratch, stream, team.share(units), Range{0, shape.c});
  });
}

struct LocalMoments {
  template <typename Element, typename Param, Relu kRelu>
  static void run(const ForwardArgs& args, double* mean, double* m2) {
    local_moments<Element, kRelu>(args, mean, m2);
  }
};
struct NormaliseByParts {
  template <typename Element, typename Param, Relu kRelu>
  static void run(const ForwardArgs& args, const Parts& parts) {
    normalise_by_parts<Element, Param, kRelu>(args, parts);
  }
};
struct LocalGradientSums {
  template <typename Element, typename Param, Relu kRelu>
  static void run(const BackwardArgs& args, double* total, double* dot) {
    local_gradient_sums<Element, Param, kRelu>(args, total, dot);
  }
};
struct GradientBySums {
  template <typename Element, typename Param, Relu kRelu>
  static void run(const BackwardArgs& args, const PartialSums& sums) {
    gradient_by_sums<Element, Param, kRelu>(args, sums);
  }
};

const SyncTable sync_table = {
    dispatch<LocalMoments, ForwardArgs, double*, double*>,
    dispatch<NormaliseByParts, ForwardArgs, const Parts&>,
    dispatch<LocalGradientSums, BackwardArgs, double*, double*>,
    dispatch<GradientBySums, BackwardArgs, const PartialSums&>,
};

}  // namespace
}  // namespace torch_bn::kernels
