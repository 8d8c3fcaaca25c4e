// One token of each row from its logits and one uniform number: temperature, top-k, top-p and min-p, in this order, and
// the inverse of the cumulative distribution, by the rules of crocuta.inference.sampling.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "activation.h"

namespace {

struct Choice {
  double temperature, top_p, min_p;  // temperature 0: the largest logit, the lowest id among equals
  int64_t top_k;
};

// e^x of numbers that are at most 0, into `to`; what float cannot hold, and -inf, is 0.
inline void weights_of(const float* x, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += kLanes<float>) {
    const Vec<float> v = load(x + i, count - i);
    store(to + i, v < -87.0f ? Vec<float>{} : vector_exp<float>(v), count - i);
  }
}

// How many of the largest numbers are kept, and the smallest of them.
struct Kept {
  int64_t number;
  float least;
};

// The k largest, or the fewest of them that have top_p of their weight. `sorted` has all numbers in any order and is
// sorted from the largest as far as needed: distributions are steep, so a few are looked at before many.
inline Kept kept_of(std::vector<float>& sorted, int64_t k, double top_p) {
  const auto first = sorted.begin();
  std::nth_element(first, first + (k - 1), sorted.end(), std::greater<float>());
  if (top_p >= 1) return {k, sorted[static_cast<size_t>(k - 1)]};
  double total = 0, reached = 0;
  std::vector<float> weights(static_cast<size_t>(k));
  weights_of(sorted.data(), k, weights.data());
  for (const float weight : weights) total += weight;
  int64_t done = 0;
  for (int64_t some = std::min<int64_t>(k, 64);; some = std::min(k, 4 * some)) {
    if (some < k) std::nth_element(first + done, first + some, first + k, std::greater<float>());
    std::sort(first + done, first + some, std::greater<float>());
    weights_of(sorted.data() + done, some - done, weights.data() + done);
    for (; done < some; ++done) {
      reached += weights[static_cast<size_t>(done)];
      if (reached >= top_p * total || done == k - 1) return {done + 1, sorted[static_cast<size_t>(done)]};
    }
  }
}

// log sum exp(x - largest) over all, in double.
inline double log_sum(const float* x, int64_t v, float largest) {
  double total = 0;
  for (int64_t i = 0; i < v; i += 4 * kLanes<float>) {
    Vec<float> sum = {};
    for (int64_t j = i; j < std::min(v, i + 4 * kLanes<float>); j += kLanes<float>) {
      const Vec<float> e = vector_exp<float>(load(x + j, v - j) - largest);
      if (v - j >= kLanes<float>)
        sum = sum + e;
      else
        for (int64_t lane = 0; lane < v - j; ++lane) total += e[lane];
    }
    for (int64_t lane = 0; lane < kLanes<float>; ++lane) total += sum[lane];
  }
  return std::log(total);
}

// The largest of a row, or NaN where there is one.
inline float largest_of(const float* x, int64_t v) {
  Vec<float> most = splat(x[0]), nan = {};
  int64_t i = 0;
  for (; i + kLanes<float> <= v; i += kLanes<float>) {
    const Vec<float> here = load(x + i);
    most = here > most ? here : most;
    nan = here == here ? nan : here;
  }
  float largest = x[0], none = 0;
  for (int64_t lane = 0; lane < kLanes<float>; ++lane) {
    largest = std::max(largest, most[lane]);
    if (nan[lane] != nan[lane]) none = nan[lane];
  }
  for (; i < v; ++i) {
    largest = std::max(largest, x[i]);
    if (x[i] != x[i]) none = x[i];
  }
  return none == none ? largest : none;
}

// The token, or -1 where the largest logit is no finite number; its log-probability before temperature and filters.
inline int64_t sample_row(const float* x, int64_t v, const Choice& choice, double uniform, float* log_prob) {
  const float largest = largest_of(x, v);
  if (!std::isfinite(largest)) return -1;
  int64_t id = 0;
  while (x[id] != largest) ++id;
  if (choice.temperature > 0) {
    const float temperature = std::max(static_cast<float>(choice.temperature), 1.17549435e-38f);
    std::vector<float> scaled(static_cast<size_t>(v)), sorted;
    for (int64_t i = 0; i < v; ++i) scaled[static_cast<size_t>(i)] = (x[i] - largest) / temperature;
    Kept kept{v, -INFINITY};
    if (choice.top_k < v || choice.top_p < 1) {
      sorted = scaled;
      kept = kept_of(sorted, std::min(v, choice.top_k), choice.top_p);
    }
    // Equals of the least are kept by their ids, as many as there is room for.
    int64_t equals = kept.number;
    for (const float s : scaled) equals -= s > kept.least;
    const float floor = choice.min_p > 0 ? static_cast<float>(std::log(choice.min_p)) : -INFINITY;
    for (float& s : scaled) {
      const bool above = s > kept.least, equal = s == kept.least && equals > 0;
      equals -= equal;
      if (!(above || equal) || s < floor) s = -INFINITY;
    }
    weights_of(scaled.data(), v, scaled.data());
    double total = 0;
    for (const float weight : scaled) total += weight;
    double reached = 0;
    for (int64_t i = 0; i < v; ++i) {
      reached += scaled[static_cast<size_t>(i)];
      if (reached > uniform * total) {
        id = i;
        break;
      }
    }
  }
  *log_prob = static_cast<float>(static_cast<double>(x[id] - largest) - log_sum(x, v, largest));
  return id;
}

}  // namespace
