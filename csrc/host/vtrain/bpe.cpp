// Byte-pair merging with an explicit list of merges: the pair of lowest rank first, the leftmost among equals. With
// ranks of merges this is Hugging Face's BPE, with ranks of the results tiktoken's. A heap keeps a piece of n bytes at
// O(n log n), so one enormous "word" cannot stall a job.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <queue>
#include <stdexcept>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace py = pybind11;

namespace {

using Ids = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

struct Merge {
    int32_t rank;
    int32_t result;
};

struct Candidate {
    int32_t rank;
    int32_t at;  // position of the left symbol
    int32_t result;
    bool operator<(const Candidate& other) const {  // std::priority_queue pops the largest: invert
        return rank != other.rank ? rank > other.rank : at > other.at;
    }
};

struct Symbol {
    int32_t id;
    int32_t previous;
    int32_t next;
    bool alive;
};

class MergeTable {
public:
    MergeTable(const Ids& byte_ids, const Ids& left, const Ids& right, const Ids& result, const Ids& rank) {
        if (byte_ids.size() != 256) throw py::value_error("MergeTable: byte_ids must have 256 entries");
        if (left.size() != right.size() || left.size() != result.size() || left.size() != rank.size())
            throw py::value_error("MergeTable: left, right, result and rank differ in length");
        byte_ids_.assign(byte_ids.data(), byte_ids.data() + 256);
        merges_.reserve(static_cast<size_t>(left.size()));
        for (py::ssize_t i = 0; i < left.size(); ++i)
            merges_[key(left.data()[i], right.data()[i])] = {rank.data()[i], result.data()[i]};
    }

    std::vector<int32_t> encode(std::string_view piece) const {
        if (piece.size() > static_cast<size_t>(INT32_MAX)) throw py::value_error("MergeTable: piece of 2 GiB or more");
        const int32_t n = static_cast<int32_t>(piece.size());
        std::vector<Symbol> symbols(static_cast<size_t>(n));
        for (int32_t i = 0; i < n; ++i)
            symbols[i] = {byte_ids_[static_cast<uint8_t>(piece[i])], i - 1, i + 1 < n ? i + 1 : -1, true};
        std::priority_queue<Candidate> queue;
        for (int32_t i = 0; i + 1 < n; ++i) push(queue, symbols, i);
        while (!queue.empty()) {
            const Candidate best = queue.top();
            queue.pop();
            Symbol& symbol = symbols[best.at];
            if (!symbol.alive || symbol.next < 0) continue;
            // The pair may have changed since it was queued; it still counts if it makes the same token.
            const auto found = merges_.find(key(symbol.id, symbols[symbol.next].id));
            if (found == merges_.end() || found->second.result != best.result) continue;
            Symbol& absorbed = symbols[symbol.next];
            absorbed.alive = false;
            symbol.id = best.result;
            symbol.next = absorbed.next;
            if (symbol.next >= 0) {
                symbols[symbol.next].previous = best.at;
                push(queue, symbols, best.at);
            }
            if (symbol.previous >= 0) push(queue, symbols, symbol.previous);
        }
        std::vector<int32_t> ids;
        for (int32_t i = n ? 0 : -1; i >= 0; i = symbols[i].next) ids.push_back(symbols[i].id);
        return ids;
    }

private:
    static uint64_t key(int32_t left, int32_t right) {
        return (static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32) | static_cast<uint32_t>(right);
    }

    void push(std::priority_queue<Candidate>& queue, const std::vector<Symbol>& symbols, int32_t at) const {
        const auto found = merges_.find(key(symbols[at].id, symbols[symbols[at].next].id));
        if (found != merges_.end()) queue.push({found->second.rank, at, found->second.result});
    }

    std::vector<int32_t> byte_ids_;
    std::unordered_map<uint64_t, Merge> merges_;
};

}  // namespace

void bind_bpe(py::module_& m) {
    py::class_<MergeTable>(m, "MergeTable", "Byte-pair merges by rank.")
        .def(py::init<const Ids&, const Ids&, const Ids&, const Ids&, const Ids&>(), py::arg("byte_ids"),
             py::arg("left"), py::arg("right"), py::arg("result"), py::arg("rank"),
             "byte_ids int32[256]; merge i joins the ids left[i], right[i] into result[i], lowest rank[i] first.")
        .def(
            "encode",
            [](const MergeTable& table, const py::bytes& piece) {
                const std::string_view view(piece);
                if (view.size() < 4096) return table.encode(view);
                py::gil_scoped_release unlocked;  // the bytes object stays referenced by the caller
                return table.encode(view);
            },
            py::arg("piece"), "The ids of one piece (bytes) as a list.");
}
