#include "planner.h"

#include <initializer_list>

namespace vtrain {

namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
constexpr uint64_t kOne = 1ull << 32;  // the sum of all weights
constexpr int64_t kMostCounted = 1ll << 62;  // of a state: counting on from there ends before 2^63

}  // namespace

void Mixture::add(std::vector<int64_t> at, std::vector<uint32_t> weights) {
    if (at.empty() || at.size() != weights.size() || !std::is_sorted(at.begin(), at.end()))
        throw std::invalid_argument("mixture: expected one weight per point, points in rising order");
    Share share;
    share.at = std::move(at);
    share.points = std::move(weights);
    sources_.push_back(std::move(share));
}

void Mixture::start(int64_t tokens) {
    tokens_ = tokens;
    weigh();
}

void Mixture::leave(size_t source) {
    sources_[source].active = false;
    weigh_at_ = 0;
}

// Gives every source its weight after `now` tokens, not normalised; the sum.
uint64_t Mixture::schedule(int64_t now, Next& next) {
    uint64_t sum = 0;
    next = {kNever, kNever};
    for (Share& share : sources_) {
        share.weight = 0;
        if (!share.active) continue;
        const auto& at = share.at;
        const size_t k = static_cast<size_t>(std::upper_bound(at.begin(), at.end(), now) - at.begin());
        share.weight = share.points[k ? k - 1 : 0];
        if (k < at.size()) {
            const bool slope = k > 0 && share.points[k] != share.points[k - 1];
            next.point = std::min(next.point, at[k]);
            next.change = std::min(next.change, slope ? now + 1 : at[k]);
            if (slope) {
                const __int128 here = now, left = at[k] - here, gone = here - at[k - 1];
                share.weight =
                    static_cast<uint64_t>((share.points[k - 1] * left + share.points[k] * gone) / (left + gone));
            }
        }
        sum += share.weight;
    }
    return sum;
}

void Mixture::weigh() {
    Next next;
    uint64_t sum = schedule(tokens_, next), given = 0;
    weigh_at_ = next.change;
    // All that would be drawn now have left, and the tokens stand still: take the weights of a later point.
    while (sum == 0 && next.point != kNever) sum = schedule(next.point, next);
    if (sum == 0) return;
    size_t heaviest = 0;
    for (size_t i = 0; i < sources_.size(); ++i)
        if (sources_[i].weight > sources_[heaviest].weight) heaviest = i;
    for (Share& share : sources_) {
        if (share.weight) share.weight = std::max<uint64_t>(1, share.weight * kOne / sum);
        given += share.weight;
    }
    sources_[heaviest].weight += kOne - given;  // unsigned wrap: also where the floor of 1 gave too much
}

int Mixture::next() {
    if (tokens_ >= weigh_at_) weigh();
    int best = -1;
    __int128 most = 0;
    for (size_t i = 0; i < sources_.size(); ++i) {
        const Share& share = sources_[i];
        if (!share.weight) continue;
        // One token more than were drawn: the first draw so goes to the heaviest source.
        const __int128 deficit = share.deficit + share.weight;
        if (best < 0 || deficit > most) {
            best = static_cast<int>(i);
            most = deficit;
        }
    }
    return best;
}

void Mixture::advance(size_t source, int64_t tokens) {
    for (Share& share : sources_) share.deficit += static_cast<__int128>(share.weight) * tokens;
    sources_[source].deficit -= static_cast<__int128>(kOne) * tokens;
    tokens_ += tokens;
}

void Planner::add(std::vector<int64_t> at, std::vector<uint32_t> weights, int64_t samples, int64_t max_epochs) {
    if (samples < 1 || max_epochs < 0) throw std::invalid_argument("planner: a source of no samples");
    mixture_.add(std::move(at), std::move(weights));
    Feed feed;
    feed.samples = feed.cursor.n = samples;
    feed.max_epochs = max_epochs;
    sources_.push_back(std::move(feed));
}

void Planner::start(int64_t tokens) {
    const auto countable = [](std::initializer_list<int64_t> counts) {
        return std::all_of(counts.begin(), counts.end(), [](int64_t n) { return n >= 0 && n <= kMostCounted; });
    };
    if (!countable({tokens}))
        throw std::invalid_argument("planner: " + std::to_string(tokens) + " tokens; expected 0..2**62");
    for (size_t i = 0; i < sources_.size(); ++i) {
        const Cursor& c = sources_[i].cursor;
        if (c.n < 1 || c.n > sources_[i].samples || c.position < 0 || c.position >= c.n)
            throw std::invalid_argument("planner: a cursor is outside its source");
        if (!countable({c.epoch, c.samples, c.tokens, c.dropped, c.cropped, c.split, c.empty, c.excluded, c.filtered}))
            throw std::invalid_argument("planner: a cursor counts beyond 0..2**62");
        if (sources_[i].max_epochs && c.epoch >= sources_[i].max_epochs) mixture_.leave(i);
    }
    mixture_.start(tokens);
}

void Planner::feed(size_t source, size_t count, const int64_t* index, const int32_t* length, const int32_t* rows,
                   const int32_t* frames, const uint8_t* skip) {
    Feed& feed = sources_.at(source);
    if (count == 0 || count > static_cast<size_t>(feed.cursor.n - feed.cursor.position))
        throw std::invalid_argument("planner: a chunk of " + std::to_string(count) + " samples; the epoch has " +
                                    std::to_string(feed.cursor.n - feed.cursor.position) + " more");
    for (size_t i = 0; i < count; ++i)
        if (length[i] < 0 || skip[i] >= kSkips || (rows && rows[i] < 0) || (frames && frames[i] < 0))
            throw std::invalid_argument("planner: sample " + std::to_string(index[i]) + " has " +
                                        std::to_string(length[i]) + " tokens, or a negative extent; expected >= 0");
    feed.used = 0;
    feed.index.assign(index, index + count);
    feed.length.assign(length, length + count);
    feed.skip.assign(skip, skip + count);
    feed.rows.assign(rows ? rows : length, rows ? rows + count : length);
    feed.frames.assign(frames ? frames : length, frames ? frames + count : length);
}

std::pair<int64_t, int32_t> Planner::overlong() const {
    const Feed& feed = sources_.at(source_);
    return {feed.index.at(feed.used), feed.length.at(feed.used)};
}

bool Planner::too_large(const Planned& item) const {
    return item.length > limits_.tokens || item.rows > limits_.rows || item.frames > limits_.frames;
}

int64_t Planner::place(Planned item, Cursor& cursor) {
    if (!too_large(item)) {
        packer_.add(item);
        return item.length;
    }
    if (overlong_ == Overlong::kError) return -1;
    // Where the rows of a cut sample lie is not known: every piece counts as many as it may have.
    Planned piece = item;
    piece.length = std::min(item.length, limits_.tokens);
    piece.rows = std::min(item.rows, piece.length);
    if (overlong_ == Overlong::kDrop || too_large(piece)) {
        ++cursor.dropped;
        return 0;
    }
    if (overlong_ == Overlong::kCrop) {
        ++cursor.cropped;
        packer_.add(piece);
        return piece.length;
    }
    ++cursor.split;
    for (int64_t done = 0; done < item.length; done += piece.length) {
        piece.start = item.start + static_cast<int32_t>(done);
        piece.length = static_cast<int32_t>(std::min<int64_t>(limits_.tokens, item.length - done));
        piece.rows = std::min(item.rows, piece.length);
        piece.to_end = item.to_end && done + piece.length == item.length;
        packer_.add(piece);
    }
    return item.length;
}

bool Planner::restore(const Planned& item) {
    Cursor counts;  // it was counted when it was drawn, except where it is lost now
    if (place(item, counts) < 0) return false;
    sources_.at(static_cast<size_t>(item.source)).cursor.dropped += counts.dropped;
    return true;
}

Packer<Planned>::Draw Planner::draw() {
    using Draw = Packer<Planned>::Draw;
    const int next = mixture_.next();
    if (next < 0) return Draw::kEnd;
    source_ = static_cast<size_t>(next);
    Feed& feed = sources_[source_];
    if (feed.used == feed.index.size()) {
        paused_ = Status::kFeed;
        return Draw::kPause;
    }
    Cursor& cursor = feed.cursor;
    const size_t at = feed.used;
    const int32_t length = feed.length[at];
    int64_t tokens = 0;
    if (feed.skip[at] != kUse) {
        ++(feed.skip[at] == kExcluded ? cursor.excluded : cursor.filtered);
    } else if (length == 0) {
        ++cursor.empty;
    } else {
        const int32_t rows = feed.rows.empty() ? 0 : feed.rows[at], frames = feed.frames.empty() ? 0 : feed.frames[at];
        tokens = place({static_cast<int32_t>(source_), 0, length, length, rows, frames, cursor.epoch, cursor.position,
                        feed.index[at], true},
                       cursor);
        if (tokens < 0) {
            paused_ = Status::kOverlong;
            return Draw::kPause;
        }
    }
    feed.useless = tokens ? 0 : feed.useless + 1;
    if (feed.useless == cursor.n) {
        paused_ = Status::kUseless;
        return Draw::kPause;
    }
    ++feed.used;
    mixture_.advance(source_, tokens);
    cursor.samples += tokens > 0;
    cursor.tokens += tokens;
    if (++cursor.position == cursor.n) {
        ++cursor.epoch;
        cursor.position = 0;
        cursor.n = feed.samples;
        if (cursor.epoch == feed.max_epochs) mixture_.leave(source_);
    }
    return Draw::kMore;
}

Planner::Status Planner::run(size_t bins) {
    using Fill = Packer<Planned>::Fill;
    while (bin_starts.size() <= bins) {
        const Fill filled = packer_.fill([this] { return draw(); }, [this](const Planned& p) { items.push_back(p); });
        if (filled == Fill::kPause) return paused_;
        if (filled == Fill::kEnd) break;
        bin_starts.push_back(static_cast<int64_t>(items.size()));
    }
    return Status::kStep;
}

}  // namespace vtrain
