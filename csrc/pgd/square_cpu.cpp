#include <algorithm>
#include <cstring>
#include <vector>

#include "pgd/row_cpu.h"
#include "pgd/square.h"
#include "runtime/parallel.h"

FR_NS_BEGIN
namespace {

constexpr int64_t kGrainElements = 8192;

// from(channel): the image that a channel's window is copied from.
template <class From>
void fill_window(const SquareArgs& a, const SquareWindow& w, SquarePlace at, float* to, const From& from) {
  const size_t bytes = static_cast<size_t>(w.width) * sizeof(float);
  for (int64_t c = 0; c < a.channels; ++c) {
    const float* source = from(c);
    for (int64_t r = 0; r < w.height; ++r) {
      const int64_t i = (c * a.height + at.top + r) * a.width + at.left;
      std::memcpy(to + i, source + i, bytes);
    }
  }
}

void row_of(const SquareArgs& a, int64_t row) {
  const int64_t base = row * a.channels * a.height * a.width;
  float *x = a.x + base, *next = a.next + base;
  if (a.hit != nullptr) {
    const bool better = square_better(a, row);
    const float* source = better ? next : x;
    fill_window(a, a.last, square_place(a, row, a.last), better ? x : next, [&](int64_t) { return source; });
    if (better) square_note(a, row);
  }
  if (a.window.height == 0) return;
  Philox4 signs{};
  fill_window(a, a.window, square_place(a, row, a.window), next, [&](int64_t c) {
    if (c % 128 == 0) signs = square_words(a, row, a.window.query, square_sign_block(c));
    return (square_up(signs, c) ? a.high : a.low) + base;
  });
}

// ---- norms 2 and 1 ----
FR_HD DVec power(Norm norm, Vec d) { return norm == Norm::l2 ? widen(d) * widen(d) : widen(vabs(d)); }

struct Move {
  const SquareMoveArgs& a;
  int64_t row, n;
  float *x, *next;
  const float* x0;

  Move(const SquareMoveArgs& args, int64_t r)
      : a(args),
        row(r),
        n(args.channels * args.height * args.width),
        x(args.x + r * n),
        next(args.next + r * n),
        x0(args.x0 + r * n) {}

  double total(int64_t begin, int64_t count) const {
    DVec s(0.);
    each_vec(count, [&](int64_t i, int m) FR_INLINE_LAMBDA {
      s = s + power(a.norm, load_m(x + begin + i, m) - load_m(x0 + begin + i, m));
    });
    return sum(s);
  }
  int64_t at(int64_t channel, int64_t r, int64_t column) const { return (channel * a.height + r) * a.width + column; }
  // f(index, count): the lines of a window in a channel; of the second window the parts outside of the first.
  template <class F>
  void lines(int64_t c, SquarePlace place, const F& f) const {
    for (int64_t r = 0; r < a.window.height; ++r) f(at(c, place.top + r, place.left), a.window.width);
  }
  template <class F>
  void lines_outside(int64_t c, SquarePlace second, SquarePlace first, const F& f) const {
    const int64_t w = a.window.width, end = second.left + w;
    for (int64_t r = second.top; r < second.top + a.window.height; ++r) {
      const bool meets = r >= first.top && r < first.top + a.window.height;
      const int64_t before = meets ? std::min(end, first.left) : end, after = std::max(second.left, first.left + w);
      if (before > second.left) f(at(c, r, second.left), before - second.left);
      if (meets && end > after) f(at(c, r, after), end - after);
    }
  }

  void settle() const {
    if (a.hit == nullptr || !square_better(a, row)) return;
    std::memcpy(x, next, static_cast<size_t>(n) * sizeof(float));
    square_note(a, row);
  }

  void propose(float* fresh) const {
    const Philox4 p = square_words(a, row, a.window.query, 0);
    const SquarePlace first = square_place(a, a.window, p, 0), second = square_place(a, a.window, p, 1);
    const int64_t area = a.window.height * a.window.width, w = a.window.width;
    const float* pattern = a.pattern + (square_turned(p) ? area : 0);
    const double eps = param_at(a.eps, row, 1, 0), used = total(0, n);
    double kept = used;
    Philox4 signs{};
    for (int64_t c = 0; c < a.channels; ++c) {
      if (c % 128 == 0) signs = square_words(a, row, a.window.query, square_sign_block(c));
      double old = 0., other = 0.;
      lines(c, first, [&](int64_t i, int64_t count) { old += total(i, count); });
      lines_outside(c, second, first, [&](int64_t i, int64_t count) { other += total(i, count); });
      float* to = fresh + c * area;
      const Vec length(static_cast<float>(std::max(square_root(a.norm, old), kSquareLeast)));
      const Vec sign(square_up(signs, c) ? 1.f : -1.f);
      DVec s(0.);
      for (int64_t r = 0; r < a.window.height; ++r) {
        const int64_t i = at(c, first.top + r, first.left);
        each_vec(w, [&](int64_t k, int m) FR_INLINE_LAMBDA {
          const Vec v =
              square_fresh(load_m(pattern + r * w + k, m), sign, load_m(x + i + k, m) - load_m(x0 + i + k, m), length);
          if (m == kLanes)
            s = s + power(a.norm, v);
          else
            s = s + power(a.norm, select(load(kLane) < Vec(static_cast<float>(m)), v, Vec(0.f)));
          store_m(to + r * w + k, v, m);
        });
      }
      const double size = square_root(a.norm, sum(s));
      const double room = square_room(a.norm, eps, used, old + other, a.channels);
      const float scale = static_cast<float>(room / std::max(size, kSquareLeast));
      each_vec(area, [&](int64_t k, int m) FR_INLINE_LAMBDA { store_m(to + k, load_m(to + k, m) * Vec(scale), m); });
      const double given = scale * size;
      kept += (a.norm == Norm::l2 ? given * given : given) - old - other;
    }
    const float stretch = square_stretch(a.norm, eps, kept);
    each_vec(n, [&](int64_t i, int m) FR_INLINE_LAMBDA {
      const Vec v0 = load_m(x0 + i, m);
      store_m(next + i, v0 + (load_m(x + i, m) - v0) * Vec(stretch), m);
    });
    for (int64_t c = 0; c < a.channels; ++c) {
      const size_t bytes = sizeof(float);
      lines_outside(c, second, first, [&](int64_t i, int64_t count) {
        std::memcpy(next + i, x0 + i, static_cast<size_t>(count) * bytes);
      });
      const float* from = fresh + c * area;
      lines(c, first, [&](int64_t i, int64_t count) {
        each_vec(count, [&](int64_t k, int m) FR_INLINE_LAMBDA {
          store_m(next + i + k, load_m(x0 + i + k, m) + load_m(from + k, m) * Vec(stretch), m);
        });
        from += count;
      });
    }
  }

  alignas(64) static constexpr float kLane[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
};

}  // namespace

void square_cpu(const SquareArgs& a) {
  const int64_t each =
      a.channels * std::max<int64_t>(1, a.window.height * a.window.width + a.last.height * a.last.width);
  parallel_for(a.batch, std::max<int64_t>(1, kGrainElements / each), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) row_of(a, row);
  });
}

void square_move_cpu(const SquareMoveArgs& a) {
  const int64_t n = a.channels * a.height * a.width;
  parallel_for(a.batch, std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, n)),
               [&](int64_t begin, int64_t end) {
                 std::vector<float> fresh(static_cast<size_t>(a.channels * a.window.height * a.window.width));
                 for (int64_t row = begin; row < end; ++row) {
                   const Move move(a, row);
                   move.settle();
                   if (a.window.height != 0) move.propose(fresh.data());
                 }
               });
}

FR_NS_END
