// crc32c.h: the hardware paths, the tables and the definition; continuing and combining.
#include "input.h"
#include "vtrain/crc32c.h"

namespace {

uint32_t bitwise(const std::vector<uint8_t>& data) {
    uint32_t c = ~0u;
    for (uint8_t byte : data)
        for (int bit = 0; bit < 8; ++bit) c = (c >> 1) ^ (((c ^ byte >> bit) & 1) ? 0x82F63B78u : 0);
    return ~c;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    using fuzz::claim;
    fuzz::Input in(data, size);
    const uint64_t length = in.number<uint16_t>(), cut = in.below(length + 1), skip = in.below(8);
    const auto before = in.number<uint32_t>();
    const std::vector<uint8_t> pattern = in.bytes(in.left());
    std::vector<uint8_t> bytes(skip + length);  // one pattern again and again: the lanes of the fast path are 4 KB each
    for (size_t i = 0; i < bytes.size() && !pattern.empty(); ++i) bytes[i] = pattern[i % pattern.size()];
    const uint8_t* p = bytes.data() + skip;
    const uint32_t whole = vtrain::crc32c(before, p, length);
    claim(whole == vtrain::crc32c_portable(before, p, length), "the tables agree");
    claim(whole == vtrain::crc32c_lanes(before, p, length), "the lanes agree");
    const uint32_t first = vtrain::crc32c(before, p, cut);
    claim(vtrain::crc32c(first, p + cut, length - cut) == whole, "a crc goes on");
    const uint32_t second = vtrain::crc32c(0, p + cut, length - cut);
    claim(vtrain::crc32c_combine(first, second, length - cut) == whole, "two crcs combine");
    claim(vtrain::crc32c(0, pattern.data(), pattern.size()) == bitwise(pattern), "the crc is that of the definition");
    return 0;
}
