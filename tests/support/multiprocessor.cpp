// The warps of a multiprocessor, one instruction after the other as each becomes ready. What is known of an instruction
// and what the numbers are is in multiprocessor.py.
#include <stdint.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <queue>
#include <tuple>
#include <vector>

namespace {

constexpr int kParts = 4;  // of a multiprocessor
enum Unit : int32_t { kNone = -1, kFirstOfAPart = 0, kMemory = 4, kTensor = 5 };
enum Kind : int32_t { kOther, kCopy, kCloseGroup, kBarrier, kMatrixWait };

struct Step {
    int32_t kind, unit, weight, stall, done, read, waits, size, cached, keeps, columns;
};

struct Latencies {
    double dram, l2, shared, other, read, tensor, start, barrier;
};

struct Program {
    int64_t alive;
    std::vector<struct Warp*> waiting;
};

struct Warp {
    Program* program;
    int64_t place, since = 0;  // since: steps done
    double scoreboards[6] = {};
    std::vector<double> copies;  // when each open group of copies is there
    double group = 0, matrix = 0;
};

// Of one of the four parts: when it can issue, and when each of its units is free.
struct Part {
    double issue = 0, units[4] = {}, tensor = 0;
};

class Run {
  public:
    Run(const Step* steps, int64_t count, int64_t warps, int64_t programs, const double* taken, double bytes,
        double l2_bytes, const Latencies& latencies)
        : steps_(steps),
          count_(count),
          warps_(warps),
          left_(programs),
          taken_(taken),
          bytes_(bytes),
          l2_bytes_(l2_bytes),
          after_(latencies) {}

    void begin(double time) {
        if (!left_) return;
        --left_;
        all_programs_.push_back(std::make_unique<Program>());
        all_programs_.back()->alive = warps_;
        for (int64_t i = 0; i < warps_; ++i) {
            all_warps_.push_back(std::make_unique<Warp>());
            all_warps_.back()->program = all_programs_.back().get();
            all_warps_.back()->place = place_++ % kParts;
            push(time, all_warps_.back().get());
        }
    }

    double finish() {
        double end = 0;
        while (!queue_.empty()) {
            const auto [time, order, warp] = queue_.top();
            queue_.pop();
            const Step& step = steps_[warp->since];
            const double ready = ready_at(*warp, step);
            if (ready > time) {
                queue_.emplace(ready, order, warp);
            } else {
                issue(time, *warp, step);
                end = std::max(end, time);
            }
        }
        return std::max(end, dram_);
    }

  private:
    void push(double time, Warp* warp) { queue_.emplace(time, ++pushed_, warp); }

    double ready_at(const Warp& warp, const Step& step) const {
        const Part& part = parts_[warp.place];
        double ready = part.issue;
        if (step.columns) {
            ready = std::max(ready, part.tensor);
        } else if (step.unit >= kFirstOfAPart && step.unit < kMemory) {
            ready = std::max(ready, part.units[step.unit]);
        }
        for (int i = 0; i < 6; ++i) {
            if (step.waits >> i & 1) ready = std::max(ready, warp.scoreboards[i]);
        }
        if (step.keeps >= 0) {
            for (int64_t i = 0; i + step.keeps < static_cast<int64_t>(warp.copies.size()); ++i) {
                ready = std::max(ready, warp.copies[i]);
            }
        }
        return step.kind == kMatrixWait ? std::max(ready, warp.matrix) : ready;
    }

    void issue(double time, Warp& warp, const Step& step) {
        Part& part = parts_[warp.place];
        part.issue = time + 1;
        double result = time + after_.other, read = time + after_.read;
        if (step.unit >= kFirstOfAPart && step.unit < kMemory) {
            part.units[step.unit] = time + taken_[step.unit] * step.weight;
        } else if (step.unit == kMemory) {
            memory_ = std::max(memory_, time) + step.weight;
            result = step.size ? moved(step) : memory_ + after_.shared;
            read = memory_ + after_.read;
        } else if (step.columns) {
            part.tensor = time + std::max(8.0, step.columns / 2.0);
            result = read = warp.matrix = part.tensor + after_.tensor;
        }
        if (step.kind == kCopy) {
            warp.group = std::max(warp.group, result);
        } else if (step.kind == kCloseGroup) {
            warp.copies.push_back(warp.group);
            warp.group = 0;
        } else if (step.keeps >= 0 && static_cast<int64_t>(warp.copies.size()) > step.keeps) {
            warp.copies.erase(warp.copies.begin(), warp.copies.end() - step.keeps);
        }
        if (step.done < 6) warp.scoreboards[step.done] = std::max(warp.scoreboards[step.done], result);
        if (step.read < 6) warp.scoreboards[step.read] = std::max(warp.scoreboards[step.read], read);
        go_on(time, warp, step);
    }

    // When an access that begins when shared memory's path has taken it is answered.
    double moved(const Step& step) {
        if (step.cached) {
            l2_ = std::max(l2_, memory_) + step.size / l2_bytes_;
            return std::max(l2_, memory_ + after_.l2);
        }
        dram_ = std::max(dram_, memory_) + step.size / bytes_;
        return std::max(dram_, memory_ + after_.dram);
    }

    void go_on(double time, Warp& warp, const Step& step) {
        Program& program = *warp.program;
        if (++warp.since == count_) {
            if (!--program.alive) begin(time + after_.start);
        } else if (step.kind == kBarrier) {
            program.waiting.push_back(&warp);
            if (static_cast<int64_t>(program.waiting.size()) == warps_) {
                for (Warp* other : program.waiting) push(time + after_.barrier, other);
                program.waiting.clear();
            }
        } else {
            push(time + step.stall, &warp);
        }
    }

    const Step* steps_;
    int64_t count_, warps_, left_;
    const double* taken_;  // cycles for which an instruction takes a unit of one of the four parts
    double bytes_, l2_bytes_;
    Latencies after_;
    Part parts_[kParts];
    double memory_ = 0, dram_ = 0, l2_ = 0;  // shared by the parts
    using Entry = std::tuple<double, int64_t, Warp*>;
    std::priority_queue<Entry, std::vector<Entry>, std::greater<Entry>> queue_;
    int64_t pushed_ = 0, place_ = 0;
    std::vector<std::unique_ptr<Program>> all_programs_;
    std::vector<std::unique_ptr<Warp>> all_warps_;
};

}  // namespace

extern "C" double cycles(const Step* steps, int64_t count, int64_t warps, int64_t programs, int64_t at_once,
                         const double* taken, double bytes, double l2_bytes, const Latencies* latencies) {
    Run run(steps, count, warps, programs, taken, bytes, l2_bytes, *latencies);
    for (int64_t i = 0; i < std::min(at_once, programs); ++i) run.begin(0);
    return run.finish();
}
