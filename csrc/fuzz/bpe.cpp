// bpe.h: the heap against merging the best pair of a list again and again.
#include <map>
#include <string_view>
#include <utility>

#include "input.h"
#include "vtrain/bpe.h"

namespace {

using Pair = std::pair<int32_t, int32_t>;

struct Table {
    std::vector<int32_t> left, right, result, rank;
};

// Results are unique in `table`, so a pair and what it makes mean the same.
std::vector<int32_t> naive(const std::vector<uint8_t>& piece, const Table& table) {
    std::map<Pair, size_t> merges;
    for (size_t i = 0; i < table.left.size(); ++i) merges[{table.left[i], table.right[i]}] = i;
    std::vector<int32_t> ids(piece.begin(), piece.end());
    while (true) {
        size_t best = ids.size(), merge = 0;
        for (size_t at = 0; at + 1 < ids.size(); ++at) {
            const auto found = merges.find({ids[at], ids[at + 1]});
            if (found == merges.end()) continue;
            if (best == ids.size() || table.rank[found->second] < table.rank[merge]) best = at, merge = found->second;
        }
        if (best == ids.size()) return ids;
        ids[best] = table.result[merge];
        ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(best) + 1);
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using fuzz::claim;
    fuzz::Input in(data, size);
    const bool unique = in.flag();
    const uint64_t merges = in.below(200);
    Table table;
    for (uint64_t i = 0; i < merges; ++i) {
        const auto known = unique ? static_cast<uint32_t>(256 + i) : 512u;
        table.left.push_back(static_cast<int32_t>(in.number<uint16_t>() % known));
        table.right.push_back(static_cast<int32_t>(in.number<uint16_t>() % known));
        table.result.push_back(static_cast<int32_t>(unique ? known : in.number<uint16_t>() % known));
        table.rank.push_back(in.number<int8_t>());
    }
    std::vector<int32_t> byte_ids(256);
    for (int32_t i = 0; i < 256; ++i) byte_ids[static_cast<size_t>(i)] = unique ? i : in.number<uint8_t>();
    const vtrain::MergeTable merge_table(byte_ids.data(), merges, table.left.data(), table.right.data(),
                                         table.result.data(), table.rank.data());
    const std::vector<uint8_t> piece = in.bytes(512);
    const auto ids = merge_table.encode({reinterpret_cast<const char*>(piece.data()), piece.size()});
    claim(ids.size() <= piece.size() && ids.empty() == piece.empty(), "merging makes fewer of some");
    if (unique) claim(ids == naive(piece, table), "the best pair first, the leftmost among equals");
    return 0;
}
