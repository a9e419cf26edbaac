// Which sample of which source goes into which bin: mixture and packer in integers, the same on every host.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace vtrain {

// A set of integers 0..limit as a tree of bits, 64 to a word: one step per level for the largest member up to a number.
class LengthSet {
public:
    explicit LengthSet(uint32_t limit) {
        size_t size = static_cast<size_t>(limit) + 1;
        do {
            level_[depth_++] = words_.size();
            size = (size + 63) / 64;
            words_.resize(words_.size() + size);
        } while (size > 1);
    }

    void insert(uint32_t v) {
        for (int l = 0; l < depth_; ++l, v >>= 6) words_[level_[l] + (v >> 6)] |= 1ull << (v & 63);
    }

    void erase(uint32_t v) {
        for (int l = 0; l < depth_; ++l, v >>= 6)
            if (words_[level_[l] + (v >> 6)] &= ~(1ull << (v & 63))) return;
    }

    // The largest member that is <= v, -1 when there is none.
    int64_t floor(uint32_t v) const {
        for (int l = 0; l < depth_; ++l) {
            const uint64_t below = words_[level_[l] + (v >> 6)] & (~0ull >> (63 - (v & 63)));
            if (below) {
                v = (v & ~63u) | highest(below);
                while (l-- > 0) v = (v << 6) | highest(words_[level_[l] + v]);
                return v;
            }
            v >>= 6;
            if (v == 0) return -1;
            --v;
        }
        return -1;
    }

private:
    static uint32_t highest(uint64_t word) { return 63u - static_cast<uint32_t>(__builtin_clzll(word)); }

    int depth_ = 0;
    size_t level_[6] = {};
    std::vector<uint64_t> words_;
};

struct Limits {
    int32_t tokens, documents, rows, frames;  // of a bin; rows, frames: kNoCap = none
    int32_t pool;                             // waiting samples to choose from
    static constexpr int32_t kNoCap = std::numeric_limits<int32_t>::max();
};

// Bins by "arrival order and finish": samples go in oldest first while they fit; then the bin is completed with the
// longest waiting one that fits (of these the oldest), again and again. Every bin starts with the oldest, so none
// starves. Item: a struct with int32 length, rows and frames; its length is in 1..limits.tokens.
template <class Item>
class Packer {
public:
    enum class Fill { kBin, kEnd, kPause };  // a bin is complete; no sample is left; the draw wants to go on later
    enum class Draw { kMore, kEnd, kPause };

    explicit Packer(const Limits& limits)
        : limits_(limits),
          capped_(limits.rows != Limits::kNoCap || limits.frames != Limits::kNoCap),
          lengths_(static_cast<uint32_t>(limits.tokens)),
          heads_(static_cast<size_t>(limits.tokens) + 1),
          tails_(static_cast<size_t>(limits.tokens) + 1) {
        size_t ring = 64;
        while (ring < 2 * static_cast<size_t>(limits.pool)) ring *= 2;
        nodes_.resize(ring);
        items_.resize(ring);
    }

    size_t waiting() const { return waiting_; }

    void add(const Item& item) {
        if (last_ - first_ == nodes_.size()) grow();
        const uint64_t arrival = last_++;
        const uint32_t length = static_cast<uint32_t>(item.length);
        nodes_[slot(arrival)] = {item.length, 0};
        items_[slot(arrival)] = item;
        if (heads_[length]) {
            nodes_[slot(tails_[length] - 1)].next = arrival + 1;
        } else {
            heads_[length] = arrival + 1;
            lengths_.insert(length);
        }
        tails_[length] = arrival + 1;
        ++waiting_;
    }

    // Go on with the bin; `draw` adds the samples of the stream, one call at a time, and tells whether there are more.
    template <class DrawOne, class Emit>
    Fill fill(DrawOne&& draw, Emit&& emit) {
        while (in_bin_ < limits_.documents) {
            while (waiting_ < static_cast<size_t>(limits_.pool)) {
                const Draw drawn = draw();
                if (drawn == Draw::kPause) return Fill::kPause;
                if (drawn == Draw::kEnd) break;
            }
            if (waiting_ == 0 || !take(emit)) break;
        }
        const bool empty = in_bin_ == 0;
        room_ = limits_;
        in_bin_ = 0;
        return empty ? Fill::kEnd : Fill::kBin;
    }

    // The waiting samples, oldest first.
    template <class See>
    void each(See&& see) const {
        for (uint64_t a = first_; a < last_; ++a)
            if (nodes_[slot(a)].length) see(items_[slot(a)]);
    }

private:
    struct Node {
        int32_t length;  // 0 = taken
        uint64_t next;   // of the same length: its arrival + 1, 0 = the last
    };

    size_t slot(uint64_t arrival) const { return arrival & (nodes_.size() - 1); }

    bool fits(uint64_t arrival) const {
        const Item& item = items_[slot(arrival)];
        return item.length <= room_.tokens && item.rows <= room_.rows && item.frames <= room_.frames;
    }

    // Arrival + 1 of the longest waiting sample that fits, of these the oldest; 0 = none. before: as in remove.
    uint64_t longest(uint64_t& before) const {
        for (int64_t length = lengths_.floor(static_cast<uint32_t>(room_.tokens)); length > 0;
             length = lengths_.floor(static_cast<uint32_t>(length - 1))) {
            before = 0;
            for (uint64_t at = heads_[static_cast<size_t>(length)]; at; before = at, at = nodes_[slot(at - 1)].next)
                if (!capped_ || fits(at - 1)) return at;
        }
        return 0;
    }

    template <class Emit>
    bool take(Emit& emit) {
        uint64_t before = 0, chosen = first_;
        if (capped_ ? !fits(first_) : nodes_[slot(first_)].length > room_.tokens) {
            const uint64_t found = longest(before);
            if (!found) return false;
            chosen = found - 1;
        }
        const Item& item = items_[slot(chosen)];
        room_.tokens -= item.length;
        if (capped_) {
            room_.rows -= item.rows;
            room_.frames -= item.frames;
        }
        ++in_bin_;
        emit(item);
        remove(chosen, before);
        return true;
    }

    // before: arrival + 1 of the sample in front of it in the list of its length, 0 = it is the first.
    void remove(uint64_t arrival, uint64_t before) {
        Node& node = nodes_[slot(arrival)];
        const size_t length = static_cast<size_t>(node.length);
        (before ? nodes_[slot(before - 1)].next : heads_[length]) = node.next;
        if (!node.next) tails_[length] = before;
        if (!heads_[length]) lengths_.erase(static_cast<uint32_t>(length));
        node.length = 0;
        --waiting_;
        while (first_ < last_ && nodes_[slot(first_)].length == 0) ++first_;
    }

    void grow() {
        std::vector<Node> nodes(2 * nodes_.size());
        std::vector<Item> items(2 * items_.size());
        for (uint64_t a = first_; a < last_; ++a) {
            nodes[a & (nodes.size() - 1)] = nodes_[slot(a)];
            items[a & (nodes.size() - 1)] = items_[slot(a)];
        }
        nodes_.swap(nodes);
        items_.swap(items);
    }

    Limits limits_, room_ = limits_;
    bool capped_;
    int32_t in_bin_ = 0;
    size_t waiting_ = 0;
    uint64_t first_ = 0, last_ = 0;  // arrivals from the oldest waiting sample to behind the newest
    std::vector<Node> nodes_;        // a ring by arrival, as items_
    std::vector<Item> items_;
    LengthSet lengths_;
    std::vector<uint64_t> heads_, tails_;  // by length: arrival + 1 of the oldest and the newest, 0 = none
};

// The source that is furthest behind its share of the tokens is drawn next. Weights are u32 fixed point, constant or
// piecewise linear in the tokens of the whole mixture, and normalised so that the drawable ones sum to 2^32.
class Mixture {
public:
    // Points (at, weight), `at` rising, two of one value = a jump; constant before the first and after the last.
    void add(std::vector<int64_t> at, std::vector<uint32_t> weights);
    void start(int64_t tokens);  // after the sources are added and restored
    void leave(size_t source);

    // The source to draw from, ties to the first; -1 when none is left. All but constant weights are those of now.
    int next();
    // A sample of `source` was drawn and takes `tokens`.
    void advance(size_t source, int64_t tokens);

    int64_t tokens() const { return tokens_; }
    __int128 deficit(size_t source) const { return sources_.at(source).deficit; }
    void set_deficit(size_t source, __int128 deficit) { sources_.at(source).deficit = deficit; }
    bool active(size_t source) const { return sources_.at(source).active; }

private:
    struct Share {
        std::vector<int64_t> at;
        std::vector<uint32_t> points;
        uint64_t weight = 0;   // of 2^32
        __int128 deficit = 0;  // the sum of weight * tokens over all draws - 2^32 * the tokens of this source
        bool active = true;
    };

    struct Next {
        int64_t change, point;  // tokens at which a weight is another, at which a schedule has a point
    };

    uint64_t schedule(int64_t now, Next& next);
    void weigh();

    std::vector<Share> sources_;
    int64_t tokens_ = 0, weigh_at_ = 0;  // the weights hold until this many tokens
};

enum class Overlong : uint8_t { kError, kDrop, kSplit, kCrop };
enum Skip : uint8_t { kUse, kExcluded, kFiltered, kSkips };  // what the plan says of a sample before it is measured

// A sample or a piece of one in a bin: tokens start..start+length-1 of `full` composed ones. to_end: not cut behind.
struct Planned {
    int32_t source, start, length, full, rows, frames;
    int64_t epoch, position, index;
    bool to_end;
};

struct Cursor {
    int64_t n = 0, epoch = 0, position = 0;  // n: samples of this epoch; the next sample is `position` of `epoch`
    int64_t samples = 0, tokens = 0;         // drawn so far, without skipped ones
    int64_t dropped = 0, cropped = 0, split = 0, empty = 0, excluded = 0, filtered = 0;
};

// Steps of bins over several sources. `run` stops when it needs to know more of a source; `feed` tells it.
class Planner {
public:
    // The step is done; source() needs a chunk; its next sample is over-long; none of its samples is of use.
    enum class Status { kStep, kFeed, kOverlong, kUseless };

    Planner(const Limits& limits, Overlong overlong) : limits_(limits), overlong_(overlong), packer_(limits) {}

    void add(std::vector<int64_t> at, std::vector<uint32_t> weights, int64_t samples, int64_t max_epochs);
    void start(int64_t tokens);  // once, after the sources and their cursors are in
    Status run(size_t bins);

    // The next samples of a source from its cursor on; rows, frames: null = none.
    void feed(size_t source, size_t count, const int64_t* index, const int32_t* length, const int32_t* rows,
              const int32_t* frames, const uint8_t* skip);
    // A sample that was drawn before and still waits, in arrival order; cut anew where it does not fit any more. False
    // where that is an error.
    bool restore(const Planned& item);

    size_t source() const { return source_; }
    size_t size() const { return sources_.size(); }
    std::pair<int64_t, int32_t> overlong() const;  // index and length of that sample
    Cursor& cursor(size_t source) { return sources_.at(source).cursor; }
    Mixture& mixture() { return mixture_; }
    const Packer<Planned>& packer() const { return packer_; }

    std::vector<Planned> items;             // of the step
    std::vector<int64_t> bin_starts = {0};  // bins + 1

private:
    struct Feed {
        Cursor cursor;
        int64_t samples, max_epochs;  // samples: of epochs that begin from now on; max_epochs: 0 = endless
        int64_t useless = 0;          // samples in a row that were skipped
        size_t used = 0;              // of the chunk
        std::vector<int64_t> index;
        std::vector<int32_t> length, rows, frames;
        std::vector<uint8_t> skip;
    };

    Packer<Planned>::Draw draw();
    // Adds a sample to the waiting ones, whole or cut; the tokens of all its pieces, 0 = dropped, -1 = an error.
    int64_t place(Planned item, Cursor& cursor);
    bool too_large(const Planned& item) const;

    Limits limits_;
    Overlong overlong_;
    Packer<Planned> packer_;
    Mixture mixture_;
    std::deque<Feed> sources_;  // cursors are handed out: they must not move
    size_t source_ = 0;
    Status paused_ = Status::kFeed;
};

}  // namespace vtrain
