// Parallel loops. They run on OpenMP, or during a replayed step on a team of threads that stays awake between loops of a
// few microseconds.
//
// An OpenMP loop waits for all of its threads. If another process occupies their cores, the loop stalls for several
// milliseconds. A team's threads take the pieces of a loop one by one, so a thread that is not running takes none. Only a
// thread that is preempted within a piece delays the loop.
#pragma once

#include <ATen/Parallel.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

namespace fiftyfold {

// Elements of simple work that justify another OpenMP thread: about 10 microseconds. A thread that is not running must
// first be woken, and the others wait for it.
constexpr int64_t kGrain = 1 << 18;
// Elements that justify another thread of a team, whose threads are awake: less than a microsecond.
constexpr int64_t kTeamGrain = 1 << 13;

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Wait in a loop. After many rounds, offer the core to other threads.
class Spin {
 public:
  void operator()() {
    if (++rounds_ < 1000) {
      pause_briefly();
    } else {
      sched_yield();
    }
  }

 private:
  int rounds_ = 0;
};

class Team {
 public:
  using Body = void (*)(void* context, int64_t piece);

  // Keeps at::get_num_threads() - 1 other threads awake, which share the loops of this thread. Only one scope per process has
  // a team at a time. In other scopes, loops run on OpenMP.
  class Scope {
   public:
    Scope() {
      const int others = at::get_num_threads() - 1;
      if (others < 1 || current_ != nullptr || at::in_parallel_region() || !of_process().mutex_.try_lock()) return;
      team_ = &of_process();
      team_->wake(others);
      current_ = team_;
    }
    ~Scope() {
      if (team_ == nullptr) return;
      current_ = nullptr;
      team_->awake_.store(0);
      team_->mutex_.unlock();
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;

   private:
    Team* team_ = nullptr;
  };

  // The team that shares the loops of this thread, or null.
  static Team* current() { return current_; }
  // Whether this thread is running a piece. Loops within a piece run serially.
  static bool in_piece() { return in_piece_; }

  // Call body(context, i) for i in [0, pieces), where 1 <= pieces < 2^16. Rethrows the first exception.
  void run(int64_t pieces, Body body, void* context) {
    body_.store(body, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    next_.store(++loop_ << 32 | static_cast<uint64_t>(pieces) << 16, std::memory_order_release);
    while (take_piece()) {
    }
    // A thread that has lost its core within a piece may need this one.
    for (Spin spin; done_.load(std::memory_order_acquire) < pieces; spin()) {
    }
    if (failed_.exchange(false)) std::rethrow_exception(std::exchange(fault_, nullptr));
  }

 private:
  static constexpr uint64_t kMask = 0xFFFF;

  // Never deleted, because its threads run until the process ends. A forked process inherits none of them, so it gets a new
  // team.
  static Team& of_process() {
    static std::atomic<Team*> team = new Team;
    static const int registered = pthread_atfork(nullptr, nullptr, [] { team.store(new Team); });
    static_cast<void>(registered);
    return *team.load();
  }

  void wake(int others) {
    try {
      for (; threads_ < others; ++threads_) std::thread([this, number = threads_] { serve(number); }).detach();
    } catch (const std::system_error&) {  // go on with the threads that exist
    }
    awake_.store(others);
    awake_.notify_all();
  }

  void serve(int number) {
    for (Spin spin;;) {
      const int awake = awake_.load();
      if (number >= awake) {
        awake_.wait(awake);
        spin = Spin();
      } else if (take_piece()) {
        spin = Spin();
      } else {
        spin();
      }
    }
  }

  // Take and run a piece of the current loop. Returns false if none is left.
  bool take_piece() {
    uint64_t next = next_.load(std::memory_order_acquire);
    const uint64_t piece = next & kMask, pieces = next >> 16 & kMask;
    if (piece >= pieces) return false;
    const Body body = body_.load(std::memory_order_relaxed);
    void* context = context_.load(std::memory_order_relaxed);
    // Fails if another thread took the piece, or if the loop has ended and `body` may belong to the next one.
    if (!next_.compare_exchange_strong(next, next + 1, std::memory_order_acq_rel)) return true;
    in_piece_ = true;
    try {
      body(context, static_cast<int64_t>(piece));
    } catch (...) {
      if (!failed_.exchange(true)) fault_ = std::current_exception();
    }
    in_piece_ = false;
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  static inline thread_local Team* current_ = nullptr;
  static inline thread_local bool in_piece_ = false;

  std::mutex mutex_;
  int threads_ = 0;
  uint64_t loop_ = 0;
  std::atomic<int> awake_{0};
  alignas(64) std::atomic<uint64_t> next_{0};  // number of the loop (32 bits), its pieces (16), the next piece (16)
  std::atomic<Body> body_{nullptr};
  std::atomic<void*> context_{nullptr};
  alignas(64) std::atomic<int64_t> done_{0};
  std::atomic<bool> failed_{false};
  std::exception_ptr fault_;
};

// Call f(begin, end) for ranges that cover [0, n), in parallel. `cost` is the work of one index, in elements.
template <typename F>
void parallel_ranges(int64_t n, int64_t cost, F f) {
  if (n < 1) return;
  cost = std::max<int64_t>(1, cost);
  if (Team* team = Team::current(); team != nullptr || Team::in_piece()) {
    const int64_t threads = Team::in_piece() ? 1 : std::min<int64_t>(at::get_num_threads(), n * cost / kTeamGrain);
    if (threads < 2 || n < 2) return f(int64_t{0}, n);
    // One piece per thread. With many small pieces, each core would read rows that are far apart.
    const int64_t each = (n + threads - 1) / threads, pieces = (n + each - 1) / each;
    auto body = [&](int64_t piece) { f(piece * each, std::min(n, (piece + 1) * each)); };
    return team->run(pieces, [](void* context, int64_t piece) { (*static_cast<decltype(body)*>(context))(piece); }, &body);
  }
  const int64_t grain = std::max<int64_t>(1, kGrain / cost);
  if (n <= grain) return f(int64_t{0}, n);
  at::parallel_for(0, n, grain, f);
}

// Call f(i) for i in [0, n), in parallel. `cost` is the work of one call, in elements.
template <typename F>
void parallel_rows(int64_t n, int64_t cost, F f) {
  parallel_ranges(n, cost, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

}  // namespace fiftyfold
