// planner.h: every sample of every epoch goes into a bin once, whole or cut as the policy says, or is counted as left
// out; no bin holds more than its limits; a planner that was put together from a state goes on as the first one.
#include <algorithm>
#include <map>
#include <memory>
#include <stdexcept>
#include <tuple>

#include "input.h"
#include "vtrain/planner.h"

namespace {

using fuzz::claim;
using fuzz::Input;
using vtrain::Cursor;
using vtrain::Limits;
using vtrain::Overlong;
using vtrain::Planned;
using vtrain::Planner;
using Status = Planner::Status;

constexpr int64_t kMostSteps = 40;

struct Facts {  // of a sample
    int32_t length, rows, frames;
    uint8_t skip;
};

struct Source {
    std::vector<int64_t> at;
    std::vector<uint32_t> weights;
    int64_t samples, max_epochs;
    std::vector<Facts> facts;  // of sample i: facts[i % size]
    const Facts& of(int64_t index) const { return facts[static_cast<size_t>(index) % facts.size()]; }
};

struct Setup {
    Limits limits;
    Overlong overlong;
    bool extents;  // whether the sources tell rows and frames
    std::vector<Source> sources;
    std::vector<uint16_t> chunks;  // sizes of the feeds, in turn
};

int32_t some_length(Input& in, const Limits& limits) {
    const auto byte = in.number<uint8_t>();
    if (byte == 255) return in.number<int32_t>() & 0x7FFF;
    if (byte >= 250) return limits.tokens + (byte - 252);
    return byte % 40;
}

Setup read_setup(Input& in) {
    Setup s{};
    s.limits = {static_cast<int32_t>(in.within(4, 300)), static_cast<int32_t>(in.within(1, 40)), Limits::kNoCap,
                Limits::kNoCap, static_cast<int32_t>(in.within(1, 200))};
    s.overlong = static_cast<Overlong>(in.below(4));
    s.extents = in.flag();
    if (in.flag()) s.limits.rows = static_cast<int32_t>(in.below(60));
    if (in.flag()) s.limits.frames = static_cast<int32_t>(in.below(10));
    s.sources.resize(in.within(1, 3));
    for (Source& source : s.sources) {
        source.at.resize(in.within(1, 3));
        for (int64_t& at : source.at) at = in.flag() ? in.number<int64_t>() : in.number<uint16_t>();
        std::sort(source.at.begin(), source.at.end());
        for (size_t i = 0; i < source.at.size(); ++i) source.weights.push_back(in.number<uint32_t>() >> in.below(32));
        source.samples = static_cast<int64_t>(in.within(1, 300));
        source.max_epochs = static_cast<int64_t>(in.below(4));
        source.facts.resize(in.within(1, 12));
        for (Facts& f : source.facts) {
            f.length = some_length(in, s.limits);
            f.rows = static_cast<int32_t>(in.below(20));
            f.frames = static_cast<int32_t>(in.below(6));
            f.skip = in.number<uint8_t>() % 16;
            if (f.skip >= vtrain::kSkips) f.skip = vtrain::kUse;
        }
    }
    s.chunks.resize(in.within(1, 4));
    for (uint16_t& chunk : s.chunks) chunk = static_cast<uint16_t>(in.within(1, 64));
    return s;
}

std::unique_ptr<Planner> make(const Setup& s) {
    auto planner = std::make_unique<Planner>(s.limits, s.overlong);
    for (const Source& source : s.sources) planner->add(source.at, source.weights, source.samples, source.max_epochs);
    return planner;
}

// The next samples of the source that asks, in the order of their numbers.
void feed(Planner& planner, const Setup& s, size_t turn) {
    const size_t number = planner.source();
    const Source& source = s.sources[number];
    const Cursor& cursor = planner.cursor(number);
    const auto count = std::min<int64_t>(s.chunks[turn % s.chunks.size()], cursor.n - cursor.position);
    std::vector<int64_t> index;
    std::vector<int32_t> length, rows, frames;
    std::vector<uint8_t> skip;
    for (int64_t i = cursor.position; i < cursor.position + count; ++i) {
        const Facts& f = source.of(i);
        index.push_back(i);
        length.push_back(f.length);
        rows.push_back(f.rows);
        frames.push_back(f.frames);
        skip.push_back(f.skip);
    }
    planner.feed(number, index.size(), index.data(), length.data(), s.extents ? rows.data() : nullptr,
                 s.extents ? frames.data() : nullptr, skip.data());
}

// A step, of bins whose items are left in the planner; false when the planner cannot go on.
bool step(Planner& planner, const Setup& s, size_t bins) {
    for (size_t turn = 0;; ++turn) {
        const Status status = planner.run(bins);
        if (status == Status::kStep) return true;
        if (status == Status::kOverlong) claim(s.overlong == Overlong::kError, "over-long samples are an error");
        if (status != Status::kFeed) return false;
        feed(planner, s, turn);
    }
}

using Place = std::tuple<int32_t, int64_t, int64_t>;  // source, epoch, position

// What was seen of every sample: the pieces so far.
class Ledger {
public:
    explicit Ledger(const Setup& setup) : s(setup) {}

    void take(const std::vector<Planned>& items, const std::vector<int64_t>& starts) {
        for (size_t bin = 0; bin + 1 < starts.size(); ++bin) {
            int64_t tokens = 0, rows = 0, frames = 0;
            for (int64_t i = starts[bin]; i < starts[bin + 1]; ++i) {
                const Planned& item = items[static_cast<size_t>(i)];
                tokens += item.length, rows += item.rows, frames += item.frames;
                add(item);
            }
            const int64_t documents = starts[bin + 1] - starts[bin];
            claim(documents > 0 && documents <= s.limits.documents, "documents of a bin");
            claim(tokens <= s.limits.tokens && rows <= s.limits.rows && frames <= s.limits.frames, "no bin overfull");
        }
        claim(starts.back() == static_cast<int64_t>(items.size()), "every item lies in a bin");
    }

    void add(const Planned& p) {
        const Facts& f = facts_of(p);
        claim(p.index == p.position && p.full == f.length && f.skip == vtrain::kUse, "the sample of that place");
        claim(p.start >= 0 && p.length > 0 && p.length <= p.full - p.start, "a piece lies in its sample");
        Seen& seen = samples[{p.source, p.epoch, p.position}];
        seen.tokens += p.length;
        ++seen.pieces;
        // Pieces may come in any order: that they do not overlap shows in starts that are multiples of the bin.
        claim(p.start % s.limits.tokens == 0 && seen.starts.emplace(p.start, p.length).second, "a piece comes once");
    }

    // With the waiting samples: what was drawn is there once, and nothing else.
    void close(Planner& planner) {
        planner.packer().each([&](const Planned& p) { add(p); });
        for (size_t number = 0; number < s.sources.size(); ++number) close(planner, static_cast<int32_t>(number));
        claim(samples.empty(), "nothing that was not drawn");
    }

private:
    struct Seen {
        int64_t tokens = 0, pieces = 0;
        std::map<int32_t, int32_t> starts;
    };

    const Facts& facts_of(const Planned& p) const { return s.sources[static_cast<size_t>(p.source)].of(p.index); }

    bool too_large(const Facts& f, int32_t length, int32_t rows) const {
        return length > s.limits.tokens || rows > s.limits.rows || frames(f) > s.limits.frames;
    }
    int32_t frames(const Facts& f) const { return s.extents ? f.frames : 0; }

    void close(Planner& planner, int32_t number) {
        const Source& source = s.sources[static_cast<size_t>(number)];
        const Cursor& cursor = planner.cursor(static_cast<size_t>(number));
        Cursor counts;
        for (int64_t epoch = 0; epoch <= cursor.epoch; ++epoch)
            for (int64_t at = 0; at < (epoch < cursor.epoch ? source.samples : cursor.position); ++at)
                settle({number, epoch, at}, source.of(at), counts);
        claim(cursor.samples == counts.samples && cursor.tokens == counts.tokens, "samples and tokens are counted");
        claim(cursor.dropped == counts.dropped && cursor.cropped == counts.cropped && cursor.split == counts.split &&
                  cursor.empty == counts.empty && cursor.excluded == counts.excluded &&
                  cursor.filtered == counts.filtered,
              "what is not used or cut is counted");
        claim(source.max_epochs == 0 || cursor.epoch <= source.max_epochs, "no epoch too many");
    }

    // A sample that was drawn: what should have become of it.
    void settle(const Place& place, const Facts& f, Cursor& counts) {
        const auto found = samples.find(place);
        const Seen seen = found == samples.end() ? Seen{} : found->second;
        if (found != samples.end()) samples.erase(found);
        int64_t tokens = f.length;
        const int32_t rows = s.extents ? f.rows : 0, cut = std::min(f.length, s.limits.tokens);
        if (f.skip != vtrain::kUse) {
            ++(f.skip == vtrain::kExcluded ? counts.excluded : counts.filtered);
            tokens = 0;
        } else if (f.length == 0) {
            ++counts.empty;
        } else if (too_large(f, f.length, rows)) {
            if (s.overlong == Overlong::kDrop || too_large(f, cut, std::min(rows, cut)))
                ++counts.dropped, tokens = 0;
            else if (s.overlong == Overlong::kCrop)
                ++counts.cropped, tokens = cut;
            else
                ++counts.split;
        }
        claim(seen.tokens == tokens, "every sample once");
        counts.samples += tokens > 0;
        counts.tokens += tokens;
    }

    const Setup& s;
    std::map<Place, Seen> samples;
};

// A planner that stands where the other one stands, made as plan.py makes it from a state.
std::unique_ptr<Planner> copy_of(Planner& planner, const Setup& s) {
    auto copy = make(s);
    for (size_t i = 0; i < s.sources.size(); ++i) {
        copy->cursor(i) = planner.cursor(i);
        copy->mixture().set_deficit(i, planner.mixture().deficit(i));
    }
    copy->start(planner.mixture().tokens());
    planner.packer().each([&](const Planned& p) { claim(copy->restore(p), "what fitted once fits again"); });
    return copy;
}

bool same(const Planned& a, const Planned& b) {
    return std::tie(a.source, a.start, a.length, a.full, a.rows, a.frames, a.epoch, a.position, a.index, a.to_end) ==
           std::tie(b.source, b.start, b.length, b.full, b.rows, b.frames, b.epoch, b.position, b.index, b.to_end);
}

void go(const Setup& s, Input& in) {
    std::unique_ptr<Planner> planner = make(s);
    const int64_t tokens = in.flag() ? in.number<int64_t>() : 0;
    planner->start(tokens);
    Ledger ledger(s);
    const size_t bins = in.within(1, 5);
    for (int64_t done = 0; done < kMostSteps; ++done) {
        std::unique_ptr<Planner> copy = in.flag() ? copy_of(*planner, s) : nullptr;
        if (!step(*planner, s, bins)) return;
        if (copy) {
            if (!step(*copy, s, bins)) return;
            claim(copy->bin_starts == planner->bin_starts && copy->items.size() == planner->items.size() &&
                      std::equal(copy->items.begin(), copy->items.end(), planner->items.begin(), same),
                  "a resumed planner goes on the same");
            std::swap(planner, copy);
        }
        __int128 deficits = 0;  // what one source is behind, others are ahead
        for (size_t i = 0; i < s.sources.size(); ++i) deficits += planner->mixture().deficit(i);
        claim(deficits == 0, "the shares of the tokens are those of the weights");
        if (planner->items.empty()) break;
        ledger.take(planner->items, planner->bin_starts);
        planner->items.clear();
        planner->bin_starts = {0};
    }
    ledger.close(*planner);
}

// Cursors and waiting samples that no planner has made, as far as bind_planner.cpp and plan.py let them through.
void go_astray(const Setup& s, Input& in) {
    std::unique_ptr<Planner> planner = make(s);
    for (size_t i = 0; i < s.sources.size(); ++i) {
        if (in.flag()) planner->cursor(i) = in.number<Cursor>();
        planner->mixture().set_deficit(i, __int128{in.number<int64_t>()} * (1ll << 36));  // below 2^100
    }
    planner->start(in.number<int64_t>());
    for (uint64_t waiting = in.below(20); waiting; --waiting) {
        const auto full = static_cast<int32_t>(in.within(1, 2000)), start = static_cast<int32_t>(in.below(full));
        const auto length = static_cast<int32_t>(in.within(1, full - start));
        const Planned item{static_cast<int32_t>(in.below(s.sources.size())), start, length, full,
                           std::min(length, in.number<int32_t>() & INT32_MAX), in.number<int32_t>() & INT32_MAX,
                           in.number<int64_t>(), in.number<int64_t>(), in.number<int64_t>(), in.flag()};
        if (!planner->restore(item)) return;
    }
    for (int64_t done = 0; done < kMostSteps && step(*planner, s, 3); ++done) {
        planner->items.clear();
        planner->bin_starts = {0};
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Input in(data, size);
    const bool astray = in.flag();
    const Setup setup = read_setup(in);
    try {
        (astray ? go_astray : go)(setup, in);
    } catch (const std::invalid_argument&) {  // a state that is refused
    }
    return 0;
}
