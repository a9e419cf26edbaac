// check.h, planes.h: batches of any numbers against the rules spelled out one by one.
#include <algorithm>
#include <memory>
#include <stdexcept>

#include "input.h"
#include "vtrain/check.h"
#include "vtrain/planes.h"

namespace {

using fuzz::claim;
using fuzz::Input;
using vtrain::Found;
using vtrain::Rule;

constexpr int64_t kModalities = 4, kRoles = 6;

// A stream of ids in one of the stores, and what its numbers are.
struct Stream {
    std::vector<int64_t> values;
    std::vector<uint8_t> stored, plane;
    char kind = 'u';
    int item = 1, bits = 0;
    bool portable = false;

    vtrain::Ids ids() const {
        return {stored.data(), kind, item, values.size(), bits ? plane.data() : nullptr, plane.size(), bits, 0, {},
                portable};
    }
};

// A pattern again and again, with some numbers of its own: long spans out of few bytes.
Stream stream_of(Input& in, uint64_t count) {
    static const struct {
        char kind;
        int item, bits;
    } kStores[] = {{'u', 1, 0}, {'u', 2, 0}, {'u', 4, 0}, {'i', 4, 0}, {'i', 8, 0}, {'u', 2, 1}, {'u', 2, 2}};
    const auto& store = kStores[in.below(7)];
    Stream s;
    s.kind = store.kind, s.item = store.item, s.bits = store.bits;
    std::vector<int64_t> pattern(in.within(1, 8));
    for (int64_t& id : pattern) id = in.flag() ? in.number<int64_t>() : in.number<uint8_t>();
    for (uint64_t i = 0; i < count; ++i) s.values.push_back(pattern[i % pattern.size()]);
    for (uint64_t edits = count ? in.below(4) : 0; edits; --edits)
        s.values[in.below(count)] = in.number<int64_t>();
    std::vector<int32_t> narrow;
    for (int64_t& id : s.values) {  // what the store can hold
        if (s.bits) id &= (1 << (16 + s.bits)) - 1;
        else if (s.kind == 'i' && s.item == 4) id = static_cast<int32_t>(id);
        else if (s.item < 8) id &= (int64_t{1} << (8 * s.item)) - 1;
        for (int byte = 0; byte < s.item; ++byte)
            s.stored.push_back(static_cast<uint8_t>(static_cast<uint64_t>(id) >> (8 * byte)));
        narrow.push_back(static_cast<int32_t>(id));
    }
    if (s.bits) {
        vtrain::PlaneBytes bytes(s.bits);
        for (size_t at = 0; at < narrow.size();) {
            const size_t some = std::min<size_t>(in.within(1, 700), narrow.size() - at);
            bytes.append(narrow.data() + at, some);
            at += some;
        }
        s.plane = bytes.data();
        s.plane.shrink_to_fit();
        claim(s.plane.size() == (s.values.size() * static_cast<size_t>(s.bits) + 7) / 8, "a plane has no byte more");
        if (s.plane.empty()) s.plane.reserve(1);  // a plane of nothing is a plane
    }
    s.stored.shrink_to_fit();
    return s;
}

// The rules, token by token.
struct Slow {
    const vtrain::Batch& b;
    const Stream &ids, *labels;

    Found run() const {
        for (size_t i = 0; i < b.count; ++i) {
            const Found found = sample(i);
            if (found.rule != vtrain::kLegal) return found;
        }
        return {};
    }

    Found sample(size_t i) const {
        const auto number = static_cast<int64_t>(i);
        const int64_t length = b.cu[i + 1] - b.cu[i];
        if (b.keys[i] == 0) return {vtrain::kZeroKey, number, 0, 0};
        Found found = b.segment_cu[i] == b.segment_cu[i + 1]
                          ? tokens(ids, i, 0, length, 0, b.vocab, vtrain::kBareId)
                          : segments(i, length);
        if (found.rule == vtrain::kLegal && b.runs && b.run_cu[i] < b.run_cu[i + 1]) {
            int64_t sum = 0;
            for (int64_t j = b.run_cu[i]; j < b.run_cu[i + 1]; ++j) sum += b.runs[j] % (1 << 24);
            if (sum != length) found = {vtrain::kRuns, number, 0, sum};
        }
        if (found.rule == vtrain::kLegal && labels) found = tokens(*labels, i, 0, length, 0, b.vocab, vtrain::kLabel);
        return found;
    }

    Found segments(size_t i, int64_t length) const {
        const auto number = static_cast<int64_t>(i);
        const int64_t first = b.segment_cu[i], last = b.segment_cu[i + 1];
        for (int64_t j = first; j < last; ++j) {
            const auto& s = b.segments[j];
            const int64_t start = s.start, stop = j + 1 < last ? int64_t{b.segments[j + 1].start} : length;
            const int64_t size = stop - start, grid = int64_t{s.t} * s.h * s.w;
            const bool picture = s.modality == 1 || s.modality == 2, merged = s.flags & 1;
            Rule rule = vtrain::kLegal;
            if (j == first && start != 0) rule = vtrain::kFirstStart;
            else if (size < 0) rule = vtrain::kSpan;
            else if (s.modality >= b.modalities) rule = vtrain::kModality;
            else if (s.role >= b.roles) rule = vtrain::kRole;
            else if (s.flags > 1) rule = vtrain::kFlags;
            else if (picture && !merged && (s.t || s.h || s.w) && grid != size) rule = vtrain::kGrid;
            if (rule != vtrain::kLegal) return {rule, number, j - first, size};
            const int64_t* span = b.spans + ((merged ? b.modalities : 0) + s.modality) * 2;
            const Found found = tokens(ids, i, start, std::min(stop, length), span[0], span[1], vtrain::kSegmentId);
            if (found.rule != vtrain::kLegal) return found;
        }
        return {};
    }

    Found tokens(const Stream& s, size_t i, int64_t start, int64_t stop, int64_t low, int64_t end, Rule rule) const {
        for (int64_t token = start; token < stop; ++token) {
            const int64_t id = s.values[static_cast<size_t>(b.cu[i] + token)];
            if (id < low || id >= end) return {rule, static_cast<int64_t>(i), token, id};
        }
        return {};
    }
};

// n + 1 offsets, the last of them the number of items: rising mostly, with steps of up to `step`.
std::vector<int64_t> offsets(Input& in, size_t n, uint64_t step) {
    std::vector<int64_t> cu(1);
    for (size_t i = 0; i < n; ++i) cu.push_back(cu.back() + static_cast<int64_t>(in.below(step + 1)));
    return cu;
}

void check_refusal(Input& in, std::vector<int64_t> cu) {
    const auto size = static_cast<uint64_t>(cu.back());
    cu[in.below(cu.size())] = in.number<int64_t>();
    const bool legal = cu[0] == 0 && static_cast<uint64_t>(cu.back()) == size && std::is_sorted(cu.begin(), cu.end());
    bool taken = true;
    try {
        vtrain::check_offsets(cu.data(), cu.size(), cu.size() - 1, size, "cu");
    } catch (const std::invalid_argument&) {
        taken = false;
    }
    claim(taken == legal, "offsets rise from 0 to the size");
}

bool same(const Found& a, const Found& b) {
    return a.rule == b.rule && a.sample == b.sample && a.item == b.item && a.value == b.value;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Input in(data, size);
    const size_t n = in.below(9);
    const auto cu = offsets(in, n, in.flag() ? 2500 : 40), segment_cu = offsets(in, n, 3), run_cu = offsets(in, n, 3);
    check_refusal(in, cu);
    const auto total = static_cast<uint64_t>(cu.back());
    Stream ids = stream_of(in, total), labels;
    const bool labelled = in.flag();
    if (labelled) labels = stream_of(in, total);
    std::vector<uint64_t> keys(n);
    for (uint64_t& key : keys) key = in.number<uint8_t>() ^ 1;
    std::vector<vtrain::PackedSegment> segments(static_cast<size_t>(segment_cu.back()));
    for (size_t i = 0; i < n; ++i) {  // mostly legal: random starts hardly ever rise
        uint32_t start = 0;
        for (auto j = static_cast<size_t>(segment_cu[i]); j < static_cast<size_t>(segment_cu[i + 1]); ++j) {
            segments[j] = {start, 0, 0, 0, 0, 0, 0, 0, 0};
            if (in.flag()) segments[j] = in.number<vtrain::PackedSegment>();
            if (in.flag()) segments[j].start = start, segments[j].flags &= 3;
            start += static_cast<uint32_t>(in.below(40));
        }
    }
    std::vector<uint32_t> runs(static_cast<size_t>(run_cu.back()));
    for (size_t i = 0; i < n; ++i)
        for (auto j = static_cast<size_t>(run_cu[i]); j < static_cast<size_t>(run_cu[i + 1]); ++j)
            runs[j] = in.flag() ? in.number<uint32_t>()
                                : j == static_cast<size_t>(run_cu[i]) ? static_cast<uint32_t>(cu[i + 1] - cu[i]) : 0;
    std::vector<int64_t> spans(4 * kModalities);
    for (int64_t& bound : spans) bound = in.flag() ? in.number<uint32_t>() : int64_t{in.number<uint8_t>()} << 16;

    const vtrain::Ids plain = ids.ids();
    vtrain::Batch batch{};
    const vtrain::Ids label_ids = labels.ids();
    batch.ids = &plain;
    batch.labels = labelled ? &label_ids : nullptr;
    batch.cu = cu.data();
    batch.segments = segments.data();
    batch.segment_cu = segment_cu.data();
    batch.keys = keys.data();
    batch.runs = in.flag() ? runs.data() : nullptr;
    batch.run_cu = run_cu.data();
    batch.spans = spans.data();
    batch.modalities = kModalities;
    batch.roles = kRoles;
    batch.vocab = in.flag() ? in.number<uint32_t>() : int64_t{1} << 40;
    batch.count = n;
    for (uint64_t i = 0; i < total; ++i) claim(plain.at(i) == ids.values[i], "ids are what was stored");
    vtrain::Extremes seen, seen_portable;
    const Found found = vtrain::check(batch, seen);
    claim(same(found, Slow{batch, ids, labelled ? &labels : nullptr}.run()), "the first broken rule");

    Stream slow_ids = ids, slow_labels = labels;
    slow_ids.portable = slow_labels.portable = true;
    const vtrain::Ids portable = slow_ids.ids(), portable_labels = slow_labels.ids();
    batch.ids = &portable;
    batch.labels = labelled ? &portable_labels : nullptr;
    claim(same(found, vtrain::check(batch, seen_portable)), "both paths find the same");
    if (found.rule != vtrain::kLegal) return 0;
    vtrain::Extremes all;
    for (int64_t id : ids.values) all.add(id, id);
    for (int64_t id : labels.values) all.add(id, id);
    for (const auto& e : {seen, seen_portable})
        claim(e.low == all.low && e.high == all.high, "the extremes of all ids");
    return 0;
}
