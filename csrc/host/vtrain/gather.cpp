// ShardTable: the samples of many mapped shards as one array. The work of a call is staged over windows of samples, so
// that the cache misses of random access (offsets, then rows, then ids) are in flight together.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "vtrain/shard_view.h"

namespace py = pybind11;

namespace {

using vtrain::Damage;
using vtrain::Range;
using vtrain::Section;
using vtrain::ShardView;

using Indices = py::array_t<int64_t, py::array::c_style>;
using Bytes = py::array_t<uint8_t, py::array::c_style>;

constexpr int64_t kWindow = 32;  // samples in flight

struct Place {
    const ShardView* view;
    uint64_t sample;
};

struct Found : Place {
    Range range;
};

// What can be read of a sample: `Row`s in a range that a table of offsets gives.
struct Ids {
    using Row = int32_t;
    bool labels;
    void prefetch_table(const Place& p) const { p.view->prefetch_tokens(p.sample); }
    Range range(const Place& p) const { return p.view->tokens(p.sample); }
    void prefetch(const Found& f) const { f.view->prefetch_ids(labels, f.range); }
    void read(const Found& f, Row* out) const { f.view->read(labels, f.range, out); }
};

struct Segments {
    using Row = vtrain::SegmentSpan;
    void prefetch_table(const Place& p) const {
        p.view->prefetch_segments(p.sample);
        p.view->prefetch_tokens(p.sample);
    }
    Range range(const Place& p) const { return p.view->segments(p.sample); }
    void prefetch(const Found& f) const { f.view->prefetch_segment_rows(f.range); }
    void read(const Found& f, Row* out) const { f.view->read_segments(f.sample, f.range, out); }
};

struct Runs {
    using Row = uint32_t;
    void prefetch_table(const Place& p) const {
        p.view->prefetch_runs(p.sample);
        p.view->prefetch_tokens(p.sample);
    }
    Range range(const Place& p) const { return p.view->runs(p.sample); }
    void prefetch(const Found& f) const { f.view->prefetch_run_rows(f.range); }
    void read(const Found& f, Row* out) const { f.view->read_runs(f.sample, f.range, out); }
};

class ShardTable {
public:
    ShardTable(std::string name, std::vector<int64_t> starts, std::vector<std::pair<std::string, uint64_t>> columns)
        : name_(std::move(name)), starts_(std::move(starts)), columns_(std::move(columns)) {
        if (starts_.empty() || starts_[0] != 0 || !std::is_sorted(starts_.begin(), starts_.end()) ||
            samples() >> 62)
            throw py::value_error(name_ + ": starts must rise from 0 to less than 2**62");
        const size_t shards = starts_.size() - 1;
        views_.resize(shards);
        files_.resize(shards);
        attached_ = std::vector<std::atomic<bool>>(shards);
        while ((samples() >> shift_) > static_cast<int64_t>(4 * shards)) ++shift_;
        for (int64_t bucket = 0; bucket <= (samples() >> shift_) + 1; ++bucket) {
            const auto after = std::upper_bound(starts_.begin(), starts_.end() - 1, bucket << shift_);
            first_.push_back(after == starts_.begin() ? 0 : static_cast<uint32_t>(after - starts_.begin()) - 1);
        }
    }

    int64_t samples() const { return starts_.back(); }

    // Gives shard `number` its file; the first one stays, should two threads bring it. sections: (id, offset, bytes, bytes of an item) of its table.
    void attach(size_t number, const std::string& file, const Bytes& data,
                const std::vector<std::tuple<std::string, uint64_t, uint64_t, uint64_t>>& sections, uint32_t max_id) {
        if (number >= views_.size()) throw py::index_error(name_ + ": no shard " + std::to_string(number));
        if (attached_[number]) return;
        std::vector<Section> table;
        for (const auto& [id, offset, bytes, item] : sections) table.push_back({id, offset, bytes, item});
        const auto count = static_cast<uint64_t>(starts_[number + 1] - starts_[number]);
        views_[number] = ShardView(file, data.data(), static_cast<uint64_t>(data.size()), count, table, columns_,
                                   max_id);
        files_[number] = data;
        attached_[number].store(true, std::memory_order_release);
        ++files_attached_;
    }

    // The shards of these samples that have no file yet, each once. IndexError for samples that are not there.
    std::vector<size_t> missing(const Indices& indices) const {
        std::vector<size_t> found;
        if (files_attached_ == views_.size()) return found;
        std::vector<bool> seen(views_.size());
        for (int64_t i = 0; i < indices.size(); ++i) {
            const size_t shard = shard_of(indices.data()[i]);
            if (seen[shard] || attached_[shard].load(std::memory_order_acquire)) continue;
            seen[shard] = true;
            found.push_back(shard);
        }
        return found;
    }

    py::array_t<int32_t> lengths(const Indices& indices) const {
        py::array_t<int32_t> out(indices.size());
        int32_t* o = out.mutable_data();
        py::gil_scoped_release unlocked;
        each(indices, Ids{false}, [&](int64_t i, const Place& p) {
            o[i] = static_cast<int32_t>(p.view->tokens(p.sample).count);
        });
        return out;
    }

    // Items of the column at `place` of the constructor's list, as bytes.
    Bytes column(size_t place, const Indices& indices) const {
        if (place >= columns_.size()) throw py::index_error(name_ + ": no column " + std::to_string(place));
        const uint64_t item = columns_[place].second;
        Bytes out(indices.size() * static_cast<py::ssize_t>(item));
        uint8_t* o = out.mutable_data();
        py::gil_scoped_release unlocked;
        switch (item) {
            case 1: gather<uint8_t>(place, indices, o); break;
            case 2: gather<uint16_t>(place, indices, o); break;
            case 4: gather<uint32_t>(place, indices, o); break;
            case 8: gather<uint64_t>(place, indices, o); break;
            default: throw py::value_error(name_ + ": column items of " + std::to_string(item) + " bytes");
        }
        return out;
    }

    py::tuple read(const Indices& indices, bool labels) const { return flat(indices, Ids{labels}); }
    py::tuple segments(const Indices& indices) const { return flat(indices, Segments{}); }
    py::tuple loss_runs(const Indices& indices) const { return flat(indices, Runs{}); }

    // (int64[M]: shard number * 2**32 + number of the segment in the shard, cu)
    py::tuple segment_numbers(const Indices& indices) const {
        py::array_t<int64_t> cu(indices.size() + 1);
        const std::vector<Found> found = find(indices, Segments{}, cu.mutable_data());
        py::array_t<int64_t> out(cu.data()[indices.size()]);
        int64_t* o = out.mutable_data();
        for (const Found& f : found)
            for (uint64_t i = 0; i < f.range.count; ++i)
                *o++ = ((f.view - views_.data()) << 32) + static_cast<int64_t>(f.range.first + i);
        return py::make_tuple(out, cu);
    }

    void read_spans(const Indices& indices, const Indices& starts, const Indices& counts,
                    py::array_t<int32_t, py::array::c_style>& out, const Indices& at, bool labels) const {
        const int64_t n = indices.size(), size = out.size();
        if (starts.size() != n || counts.size() != n || at.size() != n)
            throw py::value_error(name_ + ": read_spans: indices, starts, counts and at differ in length");
        const int64_t *start = starts.data(), *count = counts.data(), *to = at.data();
        int32_t* o = out.mutable_data();
        py::gil_scoped_release unlocked;
        const Ids ids{labels};
        Found window[kWindow];
        for (int64_t base = 0; base < n; base += kWindow) {
            const int64_t m = std::min(kWindow, n - base);
            for (int64_t j = 0; j < m; ++j) {
                window[j] = {locate(indices.data()[base + j]), Range{}};
                ids.prefetch_table(window[j]);
            }
            for (int64_t j = 0; j < m; ++j) {
                const int64_t i = base + j;
                if (to[i] < 0 || count[i] < 0 || to[i] > size || count[i] > size - to[i])
                    throw py::value_error(name_ + ": read_spans: " + std::to_string(count[i]) + " tokens to place " +
                                          std::to_string(to[i]) + " of " + std::to_string(size));
                window[j].range = part(window[j], indices.data()[i], start[i], count[i]);
                ids.prefetch(window[j]);
            }
            for (int64_t j = 0; j < m; ++j) ids.read(window[j], o + to[base + j]);
        }
    }

    // Tells the kernel to read what a later read of these samples touches.
    void will_need(const Indices& indices) const {
        static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
        py::gil_scoped_release unlocked;
        std::vector<std::pair<uintptr_t, uintptr_t>> spans;
        for (bool rows : {false, true}) {  // the offsets of all first: they are read to find the rows
            spans.clear();
            each(indices, Ids{false}, [&](int64_t, const Place& p) {
                p.view->touched(p.sample, rows, [&](const void* from, uint64_t bytes) {
                    const auto first = reinterpret_cast<uintptr_t>(from);
                    if (bytes) spans.emplace_back(first & ~(page - 1), (first + bytes + page - 1) & ~(page - 1));
                });
            });
            std::sort(spans.begin(), spans.end());
            for (size_t i = 0; i < spans.size();) {
                const uintptr_t first = spans[i].first;
                uintptr_t last = spans[i].second;
                for (++i; i < spans.size() && spans[i].first <= last; ++i) last = std::max(last, spans[i].second);
                madvise(reinterpret_cast<void*>(first), last - first, MADV_WILLNEED);  // advice: a refusal costs speed
            }
        }
    }

private:
    size_t shard_of(int64_t index) const {
        if (index < 0 || index >= samples())
            throw py::index_error(name_ + ": sample " + std::to_string(index) + " asked for; it has " +
                                  std::to_string(samples()));
        const auto bucket = static_cast<size_t>(index >> shift_);
        size_t low = first_[bucket], high = first_[bucket + 1];
        while (low < high) {  // the last shard that starts at or before it
            const size_t middle = (low + high + 1) / 2;
            if (starts_[middle] <= index)
                low = middle;
            else
                high = middle - 1;
        }
        return low;
    }

    Place locate(int64_t index) const {
        const size_t shard = shard_of(index);
        if (!attached_[shard].load(std::memory_order_acquire))
            throw py::value_error(name_ + ": shard " + std::to_string(shard) + " has no file yet");
        return {&views_[shard], static_cast<uint64_t>(index - starts_[shard])};
    }

    // use(i, place) for every sample, with the entry of its table on the way for a window ahead.
    template <class Kind, class Use>
    void each(const Indices& indices, Kind kind, Use use) const {
        const int64_t n = indices.size();
        const int64_t* index = indices.data();
        Place window[kWindow];
        for (int64_t base = 0; base < n; base += kWindow) {
            const int64_t m = std::min(kWindow, n - base);
            for (int64_t j = 0; j < m; ++j) kind.prefetch_table(window[j] = locate(index[base + j]));
            for (int64_t j = 0; j < m; ++j) use(base + j, window[j]);
        }
    }

    template <class T>
    void gather(size_t place, const Indices& indices, uint8_t* out) const {
        struct Column {
            size_t place;
            const T* at(const Place& p) const {
                return reinterpret_cast<const T*>(p.view->column(place)) + p.sample;
            }
            void prefetch_table(const Place& p) const { __builtin_prefetch(at(p)); }
        };
        const Column column{place};
        T* o = reinterpret_cast<T*>(out);
        each(indices, column, [&](int64_t i, const Place& p) { o[i] = *column.at(p); });
    }

    // Where the rows of every sample lie, and cu[n+1].
    template <class Kind>
    std::vector<Found> find(const Indices& indices, Kind kind, int64_t* cu) const {
        std::vector<Found> found(static_cast<size_t>(indices.size()));
        cu[0] = 0;
        py::gil_scoped_release unlocked;
        each(indices, kind, [&](int64_t i, const Place& p) {
            const Range range = kind.range(p);
            found[static_cast<size_t>(i)] = {p, range};
            cu[i + 1] = cu[i] + static_cast<int64_t>(range.count);
        });
        return found;
    }

    // (rows of all samples laid end to end, as bytes; cu)
    template <class Kind>
    py::tuple flat(const Indices& indices, Kind kind) const {
        using Row = typename Kind::Row;
        py::array_t<int64_t> cu(indices.size() + 1);
        const std::vector<Found> found = find(indices, kind, cu.mutable_data());
        const int64_t* c = cu.data();
        Bytes out(c[indices.size()] * static_cast<py::ssize_t>(sizeof(Row)));
        Row* o = reinterpret_cast<Row*>(out.mutable_data());
        {
            py::gil_scoped_release unlocked;
            constexpr auto kAhead = static_cast<size_t>(kWindow / 2);
            for (size_t i = 0; i < std::min(kAhead, found.size()); ++i) kind.prefetch(found[i]);
            for (size_t i = 0; i < found.size(); ++i) {
                if (i + kAhead < found.size()) kind.prefetch(found[i + kAhead]);
                kind.read(found[i], o + c[i]);
            }
        }
        return py::make_tuple(out, cu);
    }

    Range part(const Place& p, int64_t index, int64_t start, int64_t count) const {
        const Range whole = p.view->tokens(p.sample);
        const auto length = static_cast<int64_t>(whole.count);
        if (start < 0 || count < 0 || start > length || count > length - start)
            throw py::value_error(name_ + ": read_spans: " + std::to_string(count) + " tokens from " +
                                  std::to_string(start) + " of sample " + std::to_string(index) + ", which has " +
                                  std::to_string(length));
        return {whole.first + static_cast<uint64_t>(start), static_cast<uint64_t>(count)};
    }

    std::string name_;
    std::vector<int64_t> starts_;  // first sample of each shard, and the end
    std::vector<std::pair<std::string, uint64_t>> columns_;
    std::vector<ShardView> views_;
    std::vector<py::object> files_;  // keeps the mappings alive
    std::vector<std::atomic<bool>> attached_;
    std::atomic<size_t> files_attached_{0};
    int shift_ = 0;
    std::vector<uint32_t> first_;  // the shard of every sample that is a multiple of 2**shift_: where a search starts
};

// The bytes of a file, mapped; no descriptor stays open, so a process may hold 100k of them.
Bytes map_file(const std::string& path, size_t bytes) {
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat status {};
    void* data = MAP_FAILED;
    if (file >= 0 && fstat(file, &status) == 0 && static_cast<size_t>(status.st_size) == bytes)
        data = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, file, 0);
    const int error = errno;
    if (file >= 0) close(file);
    if (data == MAP_FAILED) {
        if (file >= 0 && static_cast<size_t>(status.st_size) != bytes)
            throw Damage(path + ": file: " + std::to_string(status.st_size) + " bytes; expected " +
                         std::to_string(bytes));
        errno = error;
        PyErr_SetFromErrnoWithFilename(PyExc_OSError, path.c_str());
        throw py::error_already_set();
    }
    struct Mapping {
        void* data;
        size_t bytes;
    };
    py::capsule owner(new Mapping{data, bytes}, [](void* held) {
        auto* mapping = static_cast<Mapping*>(held);
        munmap(mapping->data, mapping->bytes);
        delete mapping;
    });
    Bytes found(static_cast<py::ssize_t>(bytes), static_cast<const uint8_t*>(data), owner);
    found.attr("flags").attr("writeable") = false;
    return found;
}

}  // namespace

void bind_gather(py::module_& m) {
    py::register_local_exception_translator([](std::exception_ptr error) {
        try {
            if (error) std::rethrow_exception(error);
        } catch (const Damage& damage) {
            const py::object kind = py::module_::import("vtrain.data.format").attr("ShardError");
            PyErr_SetString(kind.ptr(), damage.what());
        }
    });
    m.def("map_file", &map_file, py::arg("path"), py::arg("bytes"),
          "u8[bytes], read-only: a file of exactly that size, mapped; no descriptor stays open.");
    m.def(
        "force_isa",
        [](std::optional<std::string> name) {
            if (!vtrain::force_isa(name ? name->c_str() : nullptr))
                throw py::value_error("force_isa: this machine cannot run " + *name);
        },
        py::arg("name"), "Decode ids with `portable`, `avx2` or `avx512`; None = the best of this machine. For tests.");
    const auto indices = [] { return py::arg("indices").noconvert(); };
    py::class_<ShardTable>(m, "ShardTable", "The samples of many mapped shards as one array; cu arrays start at 0.")
        .def(py::init<std::string, std::vector<int64_t>, std::vector<std::pair<std::string, uint64_t>>>(),
             py::arg("name"), py::arg("starts"), py::arg("columns"))
        .def("attach", &ShardTable::attach, py::arg("number"), py::arg("file"), py::arg("data").noconvert(),
             py::arg("sections"), py::arg("max_id"))
        .def("missing", &ShardTable::missing, indices(), "Shards of these samples that are not attached yet.")
        .def("lengths", &ShardTable::lengths, indices(), "int32[n]")
        .def("column", &ShardTable::column, py::arg("place"), indices(), "u8[n * item]: items of a column")
        .def("read", &ShardTable::read, indices(), py::arg("labels"), "(int32 rows as u8, cu)")
        .def("segments", &ShardTable::segments, indices(), "(format.SEGMENT_SPAN rows as u8, cu)")
        .def("loss_runs", &ShardTable::loss_runs, indices(), "(u32 rows as u8, cu)")
        .def("segment_numbers", &ShardTable::segment_numbers, indices(), "(int64[M], cu)")
        .def("read_spans", &ShardTable::read_spans, indices(), py::arg("starts").noconvert(),
             py::arg("counts").noconvert(), py::arg("out").noconvert(), py::arg("at").noconvert(), py::arg("labels"))
        .def("will_need", &ShardTable::will_need, indices());
}
