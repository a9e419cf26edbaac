// Byte-pair merging with an explicit list of merges: the pair of lowest rank first, the leftmost among equals. With
// ranks of merges this is Hugging Face's BPE, with ranks of the results tiktoken's. A heap keeps a piece of n bytes at
// O(n log n), so one enormous "word" cannot stall a job.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace vtrain {

class MergeTable {
public:
    // byte_ids[256]: the ids of single bytes; merge i joins left[i], right[i] into result[i], lowest rank[i] first.
    MergeTable(const int32_t* byte_ids, size_t merges, const int32_t* left, const int32_t* right,
               const int32_t* result, const int32_t* rank);

    // The ids of a piece; std::invalid_argument for one of 2 GiB or more.
    std::vector<int32_t> encode(std::string_view piece) const;

private:
    struct Merge {
        int32_t rank;
        int32_t result;
    };
    struct Symbol {
        int32_t id;
        int32_t previous;
        int32_t next;
        bool alive;
    };

    static uint64_t key(int32_t left, int32_t right) {
        return (static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32) | static_cast<uint32_t>(right);
    }
    // The merge of the symbol at `at` with the next one, null = none.
    const Merge* find(const std::vector<Symbol>& symbols, int32_t at) const;

    std::vector<int32_t> byte_ids_;
    std::unordered_map<uint64_t, Merge> merges_;
};

}  // namespace vtrain
