// Runs a fuzz target without a fuzzer: `target [--runs N] FILE|FOLDER...` replays the files, then N changed ones of
// them (of nothing, without files). Always the same ones; where it ends badly the input lies in ./crash-input.
#include <sanitizer/common_interface_defs.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>

#include "input.h"

namespace {

using Bytes = std::vector<uint8_t>;

constexpr size_t kMostBytes = 4096;

Bytes current;

void save() {
    std::ofstream out("crash-input", std::ios::binary);
    out.write(reinterpret_cast<const char*>(current.data()), static_cast<std::streamsize>(current.size()));
}

void run(Bytes input) {
    current = std::move(input);
    LLVMFuzzerTestOneInput(current.data(), current.size());
}

Bytes read(const std::filesystem::path& path) {
    std::ifstream in(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
}

// One of: a byte at random, a number that is often a limit, a run of bytes from elsewhere, bytes gone, bytes more.
void change(Bytes& input, std::mt19937_64& draw) {
    const auto below = [&](size_t n) { return static_cast<size_t>(draw() % n); };
    const size_t at = below(input.size() + 1), some = std::min(input.size() - at, size_t{1} << below(7));
    const auto place = input.begin() + static_cast<std::ptrdiff_t>(at);
    switch (below(5)) {
        case 0: std::generate_n(place, std::min<size_t>(some, 1), draw); break;
        case 1: std::fill_n(place, some, below(2) ? 0xFF : 0); break;
        case 2: std::copy_n(Bytes(input).begin() + static_cast<std::ptrdiff_t>(below(input.size() - some + 1)),
                            some, place); break;
        case 3: input.erase(place, place + static_cast<std::ptrdiff_t>(some)); break;
        default: {
            Bytes more(std::min(size_t{1} << below(6), kMostBytes - std::min(kMostBytes, input.size())));
            std::generate(more.begin(), more.end(), draw);
            input.insert(place, more.begin(), more.end());
        }
    }
}

}  // namespace

extern "C" const char* __asan_default_options() { return "handle_abort=1"; }  // broken claims are reported as well

int main(int count, char** arguments) {
    __sanitizer_set_death_callback(save);
    unsigned long runs = 0;
    std::vector<Bytes> seeds;
    for (int i = 1; i < count; ++i) {
        const std::filesystem::path path = arguments[i];
        if (path == "--runs" && i + 1 < count) {
            runs = std::stoul(arguments[++i]);
        } else if (std::filesystem::is_directory(path)) {
            std::vector<std::filesystem::path> files;
            for (const auto& entry : std::filesystem::directory_iterator(path)) files.push_back(entry.path());
            std::sort(files.begin(), files.end());
            for (const auto& file : files) seeds.push_back(read(file));
        } else {
            seeds.push_back(read(path));
        }
    }
    for (const Bytes& seed : seeds) run(seed);
    std::mt19937_64 draw(1);
    for (unsigned long i = 0; i < runs; ++i) {
        Bytes input = seeds.empty() ? Bytes(draw() % 512) : seeds[draw() % seeds.size()];
        if (seeds.empty()) std::generate(input.begin(), input.end(), draw);
        for (unsigned long changes = 1 + draw() % 6; changes; --changes) change(input, draw);
        run(std::move(input));
    }
    std::printf("%zu files, %lu changed ones\n", seeds.size(), runs);
    return 0;
}
