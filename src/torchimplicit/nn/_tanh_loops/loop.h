// The loop that takes steps until every sample is done or given up.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "steps.h"

namespace torchimplicit {

// When a loop looks, and when it gives up.
struct Pace {
  int64_t max_steps, block;
  bool extrapolate, mixed;
  int64_t patience;  // steps after which a row must have come on,
  double progress;   // by this factor of its best residual
};

// What a loop found of each sample.
struct Found {
  Tensor z, value, norm, steps, done;
  std::vector<double> peak;  // the largest norm at a look
  int64_t taken = 0, looks = 0;
  bool clean = false;  // whether all are done
};

inline Found begin(const Tensor& z, const Tensor& value) {
  const auto longs = z.options().dtype(at::kLong), bools = z.options().dtype(at::kBool);
  const int64_t rows = z.size(0);
  return {z.clone(), value.clone(), at::empty({rows}, z.options()), at::empty({rows}, longs),
          at::empty({rows}, bools), {}};
}

// Steps until every row is done or given up. A row that has `passed` is done before the first step, and one
// that begins with no finite residual is given up there. What a row returns is where the look found it that judged it. `within(row, norm, value, z, peak)` says whether a sample has converged.
template <class T, class Steps, class Within>
void loop(Steps& steps, Found& found, const std::vector<double>& first, const std::vector<char>& passed,
          const Pace& pace, Within within) {
  struct Row {
    int64_t sample;
    double norm, peak, best, reference;
  };
  const int64_t n = found.z.size(1);
  T* norm_out = found.norm.mutable_data_ptr<T>();
  int64_t* steps_out = found.steps.mutable_data_ptr<int64_t>();
  bool* done_out = found.done.mutable_data_ptr<bool>();
  found.peak = first;
  std::vector<Row> rows;
  std::vector<int64_t> kept;
  int64_t given_up = 0, looked = 0;
  for (int64_t i = 0; i < int64_t(first.size()); ++i) {
    norm_out[i] = first[i];
    steps_out[i] = 0;
    done_out[i] = passed[i];
    if (!passed[i] && !std::isfinite(first[i])) {
      ++given_up;
    } else if (!passed[i]) {
      kept.push_back(i);
      rows.push_back({i, first[i], first[i], first[i], first[i]});
    }
  }
  steps.keep(kept);
  while (!rows.empty() && found.taken < pace.max_steps) {
    steps.walk(pace.block);
    const bool due = found.taken + pace.block - looked >= pace.patience, last = found.taken + pace.block >= pace.max_steps;
    kept.clear();
    for (int64_t j = 0; j < int64_t(rows.size()); ++j) {
      Row& row = rows[j];
      const T *z = steps.z().at(j), *value = steps.value().at(j);
      const Judged judged{distance(value, z, n), row.norm, found.taken == 0};
      row.norm = judged.norm;
      row.peak = std::max(row.peak, row.norm);
      row.best = std::min(row.best, row.norm);
      const bool done = within(row.sample, row.norm, value, z, row.peak);
      const bool stuck = due && !(row.best < pace.progress * row.reference);
      const bool goes = !done && !stuck && std::isfinite(row.norm);
      if (due) row.reference = row.best;
      if (goes && !last) {
        steps.go_on(j, judged);
        kept.push_back(j);
        continue;
      }
      given_up += !done;
      done_out[row.sample] = done;
      norm_out[row.sample] = row.norm;
      found.peak[row.sample] = row.peak;
      steps_out[row.sample] = found.taken + pace.block;
      std::memcpy(found.z.mutable_data_ptr<T>() + row.sample * n, z, n * sizeof(T));
      std::memcpy(found.value.mutable_data_ptr<T>() + row.sample * n, value, n * sizeof(T));
    }
    found.taken += pace.block;
    ++found.looks;
    if (due) looked = found.taken;
    if (kept.size() == rows.size()) continue;
    if (!kept.empty()) steps.keep(kept);
    for (size_t j = 0; j < kept.size(); ++j) rows[j] = rows[kept[j]];
    rows.resize(kept.size());
  }
  found.clean = rows.empty() && given_up == 0;
}

}  // namespace torchimplicit
