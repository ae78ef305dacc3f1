// Loops in parallel: by OpenMP, or in replayed steps by a team of threads, for loops that take microseconds.
//
// An OpenMP loop waits for all of its threads. If another process uses their cores, it waits for the scheduler, several
// milliseconds each time. A team hands out a loop piece by piece: a thread that does not run takes none, and is not waited
// for.
#pragma once

#include <ATen/Parallel.h>
#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>

namespace fiftyfold {

// Elements of simple work that justify another OpenMP thread: about 10 microseconds. A thread that is not running must
// first be woken, and the others wait for it.
constexpr int64_t kGrain = 1 << 18;
// Elements of a loop that a team shares, whose threads are awake.
constexpr int64_t kTeamLoop = 1 << 14;

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Team {
 public:
  using Body = void (*)(void* context, int64_t piece);

  // While it exists, at::get_num_threads() - 1 other threads are awake and share the loops of this thread. Only one scope of
  // a process has a team. The loops of others run by OpenMP.
  class Scope {
   public:
    Scope() {
      const int others = at::get_num_threads() - 1;
      if (others < 1 || at::in_parallel_region() || !of_process().mutex_.try_lock()) return;
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
  // True within a piece. Its own loops are not shared.
  static bool in_piece() { return in_piece_; }

  // Call body(context, i) for i in [0, pieces), where 1 <= pieces < 2^20. Rethrows the first exception.
  void run(int64_t pieces, Body body, void* context) {
    body_.store(body, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    loop_ = (loop_ + 1) & kMask;
    next_.store(loop_ << 40 | static_cast<uint64_t>(pieces) << 20, std::memory_order_release);
    while (take_piece()) {
    }
    for (int waits = 0; done_.load(std::memory_order_acquire) < pieces; ++waits) {
      if (waits < 1000) {
        pause_briefly();
      } else {
        sched_yield();  // the thread that has the last piece may need this core
      }
    }
    if (failed_.exchange(false)) std::rethrow_exception(std::exchange(fault_, nullptr));
  }

 private:
  static constexpr uint64_t kMask = (uint64_t{1} << 20) - 1;

  // Never deleted, because its threads run until the process ends. A forked process has none of them and gets a new team.
  static Team& of_process() {
    static std::atomic<Team*> team = new Team;
    static const int registered = pthread_atfork(nullptr, nullptr, [] { team.store(new Team); });
    static_cast<void>(registered);
    return *team.load();
  }

  void wake(int others) {
    for (; threads_ < others; ++threads_) std::thread([this, number = threads_] { serve(number); }).detach();
    awake_.store(others);
    awake_.notify_all();
  }

  void serve(int number) {
    for (;;) {
      const int awake = awake_.load();
      if (number >= awake) {
        awake_.wait(awake);
      } else if (!take_piece()) {
        pause_briefly();
      }
    }
  }

  // Run a piece of the current loop. Returns false if none is left.
  bool take_piece() {
    uint64_t next = next_.load(std::memory_order_acquire);
    const uint64_t piece = next & kMask, pieces = next >> 20 & kMask;
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
  alignas(64) std::atomic<uint64_t> next_{0};  // number of the loop (20 bits), its pieces (20), the next piece (20)
  std::atomic<Body> body_{nullptr};
  std::atomic<void*> context_{nullptr};
  alignas(64) std::atomic<int64_t> done_{0};
  std::atomic<bool> failed_{false};
  std::exception_ptr fault_;
};

// Call f(begin, end) for ranges that cover [0, n), in parallel. `cost` is the work of one index, in elements.
template <typename F>
void parallel_ranges(int64_t n, int64_t cost, F f) {
  cost = std::max<int64_t>(1, cost);
  Team* team = Team::current();
  if (team != nullptr || Team::in_piece()) {
    if (team == nullptr || Team::in_piece() || n <= 1 || n * cost < kTeamLoop) {
      if (n > 0) f(int64_t{0}, n);
      return;
    }
    // One piece per thread: of many small pieces, each core would read rows that lie apart.
    const int64_t threads = at::get_num_threads(), each = (n + threads - 1) / threads, pieces = (n + each - 1) / each;
    auto body = [&](int64_t piece) { f(piece * each, std::min(n, (piece + 1) * each)); };
    team->run(pieces, [](void* context, int64_t piece) { (*static_cast<decltype(body)*>(context))(piece); }, &body);
    return;
  }
  const int64_t grain = std::max<int64_t>(1, kGrain / cost);
  if (n <= grain) {
    if (n > 0) f(int64_t{0}, n);
    return;
  }
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
