#include "bpe.h"

#include <queue>
#include <stdexcept>

namespace vtrain {
namespace {

struct Candidate {
    int32_t rank;
    int32_t at;  // position of the left symbol
    int32_t result;
    bool operator<(const Candidate& other) const {  // std::priority_queue pops the largest: invert
        return rank != other.rank ? rank > other.rank : at > other.at;
    }
};

}  // namespace

MergeTable::MergeTable(const int32_t* byte_ids, size_t merges, const int32_t* left, const int32_t* right,
                       const int32_t* result, const int32_t* rank)
    : byte_ids_(byte_ids, byte_ids + 256) {
    merges_.reserve(merges);
    for (size_t i = 0; i < merges; ++i) merges_[key(left[i], right[i])] = {rank[i], result[i]};
}

const MergeTable::Merge* MergeTable::find(const std::vector<Symbol>& symbols, int32_t at) const {
    const auto found = merges_.find(key(symbols[at].id, symbols[symbols[at].next].id));
    return found == merges_.end() ? nullptr : &found->second;
}

std::vector<int32_t> MergeTable::encode(std::string_view piece) const {
    if (piece.size() > static_cast<size_t>(INT32_MAX))
        throw std::invalid_argument("MergeTable: piece of 2 GiB or more");
    const int32_t n = static_cast<int32_t>(piece.size());
    std::vector<Symbol> symbols(static_cast<size_t>(n));
    for (int32_t i = 0; i < n; ++i)
        symbols[i] = {byte_ids_[static_cast<uint8_t>(piece[i])], i - 1, i + 1 < n ? i + 1 : -1, true};
    std::priority_queue<Candidate> queue;
    const auto push = [&](int32_t at) {
        if (const Merge* merge = find(symbols, at)) queue.push({merge->rank, at, merge->result});
    };
    for (int32_t i = 0; i + 1 < n; ++i) push(i);
    while (!queue.empty()) {
        const Candidate best = queue.top();
        queue.pop();
        Symbol& symbol = symbols[best.at];
        if (!symbol.alive || symbol.next < 0) continue;
        // The pair may have changed since it was queued; it still counts if it makes the same token.
        const Merge* merge = find(symbols, best.at);
        if (merge == nullptr || merge->result != best.result) continue;
        Symbol& absorbed = symbols[symbol.next];
        absorbed.alive = false;
        symbol.id = best.result;
        symbol.next = absorbed.next;
        if (symbol.next >= 0) {
            symbols[symbol.next].previous = best.at;
            push(best.at);
        }
        if (symbol.previous >= 0) push(symbol.previous);
    }
    std::vector<int32_t> ids;
    for (int32_t i = n ? 0 : -1; i >= 0; i = symbols[i].next) ids.push_back(symbols[i].id);
    return ids;
}

}  // namespace vtrain
