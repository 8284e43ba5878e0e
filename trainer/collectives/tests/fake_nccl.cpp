// A library with NCCL's face and no GPU behind it: ranks are threads of one process, device memory is host memory, and a
// stream is a pair of counters. It really sums, checks that it is called as the real one demands, and goes wrong on
// request. Follows NCCL 2.28.9's src/init.cc and src/group.cc where the caller can tell the difference.
#include <algorithm>
#include <atomic>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <unistd.h>
#include <vector>

namespace {

enum Result { Success, UnhandledCudaError, SystemError, InternalError, InvalidArgument, InvalidUsage, RemoteError,
              InProgress };

struct UniqueId {
    unsigned char internal[128];
};

// Of 2.30.7. What an older version has of it ends at size_of_config().
struct Config {
    size_t size;
    unsigned int magic, version;
    int blocking, cgaClusterSize, minCTAs, maxCTAs;
    const char* netName;
    int splitShare;
    int trafficClass;      // 2.26
    const char* commName;  // 2.27
    int collnetEnable, CTAPolicy, shrinkShare, nvlsCTAs;
    int nChannelsPerNetPeer, nvlinkCentricSched;  // 2.28
    int graphUsageMode, numRmaCtx;                // 2.29
    int maxP2pPeers, graphStreamOrdering;         // 2.30
};

struct Stream {
    std::atomic<uint64_t> enqueued{0}, completed{0};
};

struct Comm;

struct Operation {
    std::string what;  // kind, count, type, root: equal on all ranks
    size_t count;
    int type, root;
    bool sum, hangs = false;
    std::map<int, void*> buffers;
    std::map<int, Stream*> streams;
};

struct Clique {
    int ranks, arrived = 0, finalized = 0, number = 0;
    uint64_t done = 0;
    std::vector<Operation> operations;
};

struct Comm {
    Clique* clique;
    int rank;
    uint64_t next = 0;
    long polls = 0;
    int error = Success;
    bool starting = true, finalizing = false, finalized = false, stopped = false, dead = false;
};

std::mutex mutex;
std::map<uint64_t, Clique*> cliques;
std::vector<Comm*> comms;
std::map<std::string, long> knobs;
std::map<int, int> inside;
std::string last_error;
uint64_t next_id = 1;
thread_local int group_depth = 0;
thread_local std::vector<Comm*> group_aborts;

// The knobs: what the tests can ask for, and what they can count.
//   version          what the library says it is
//   init_polls       how often a start is "in progress"; -1: forever (op_polls, finalize_polls: the same for those)
//   hang_at          the operation of this number never completes; hang_clique: only in that communicator
//   async_error      what ncclCommGetAsyncError reports on rank async_rank
//   call_error       what ncclAllReduce returns
//   abort_hangs      ncclCommAbort never returns
//   dwell_us         how long a call stays inside the library
//   gate             calls that come while it is set stay inside until it is not
//   violations, starts, calls, destroys, aborts, together (aborts in a group call): counted
//   inside           how many threads are
long knob(const char* name, long otherwise) {
    auto found = knobs.find(name);
    return found == knobs.end() ? otherwise : found->second;
}

int failed(int code, const std::string& why) {
    last_error = why;
    return code;
}

int violated(const std::string& why) {
    knobs["violations"]++;
    std::fprintf(stderr, "fake nccl: %s\n", why.c_str());
    return failed(InvalidArgument, why);
}

[[noreturn]] void hang() {
    for (;;) pause();
}

// Counts the threads of a rank that are inside: more than one at a time is against the rules here.
struct Inside {
    int rank;
    explicit Inside(int rank) : rank(rank) {
        long dwell;
        {
            std::lock_guard<std::mutex> lock(mutex);
            knobs["inside"]++;
            if (++inside[rank] > 1) violated("two threads of one rank at once");
            dwell = knob("dwell_us", 0);
        }
        if (dwell > 0) usleep(dwell);
        while (closed()) usleep(1000);
    }
    static bool closed() {
        std::lock_guard<std::mutex> lock(mutex);
        return knob("gate", 0) != 0;
    }
    ~Inside() {
        std::lock_guard<std::mutex> lock(mutex);
        knobs["inside"]--;
        inside[rank]--;
    }
};

// A communicator that this library made and that was not freed.
bool alive(Comm* comm) {
    bool known = std::find(comms.begin(), comms.end(), comm) != comms.end();
    if (!known || comm->dead) violated("a communicator that does not exist, any more");
    return known && !comm->dead;
}

int state_of(Comm* comm) {
    if (comm->error != Success) return comm->error;
    if (knob("async_error", 0) != 0 && knob("async_rank", -1) == comm->rank && !comm->starting) {
        last_error = "NET/Socket : Connection closed by remote peer";
        return knob("async_error", 0);
    }
    if (comm->polls != 0) {
        if (comm->polls > 0) comm->polls--;
        return InProgress;
    }
    if (comm->starting) {
        if (comm->clique->arrived < comm->clique->ranks) return InProgress;
        comm->starting = false;
    }
    if (comm->finalizing) {
        if (comm->clique->finalized < comm->clique->ranks) return InProgress;
        comm->finalizing = false;
        comm->finalized = true;
    }
    return Success;
}

// ncclCommEnsureReady
int ready(Comm* comm) {
    int state = state_of(comm);
    if (state == InProgress) return violated("used before the previous operation was through");
    return state;
}

size_t size_of_config(long version) {
    if (version < 22600) return offsetof(Config, commName);  // trafficClass is padding
    if (version < 22700) return offsetof(Config, commName);
    if (version < 22800) return offsetof(Config, nChannelsPerNetPeer);
    if (version < 22900) return offsetof(Config, graphUsageMode);
    if (version < 23000) return offsetof(Config, maxP2pPeers);
    return sizeof(Config);
}

// parseCommConfig
int parse(const Config* given) {
    const Config defaults = {sizeof(Config), 0xcafebeef, 0, INT_MIN, INT_MIN, INT_MIN, INT_MIN, nullptr, INT_MIN,
                             INT_MIN, nullptr, INT_MIN, INT_MIN, INT_MIN, INT_MIN, INT_MIN, INT_MIN, INT_MIN, INT_MIN,
                             INT_MIN, INT_MIN};
    Config config = defaults;
    config.magic = 0;
    size_t size;
    memcpy(&size, given, sizeof(size));
    memcpy(&config, given, std::min(size, size_of_config(knob("version", 22809))));
    if (config.magic != 0xcafebeef) return failed(InvalidArgument, "config: magic");
    if (config.version < 21800) return failed(InvalidArgument, "config: version");
    if (config.version < 22500) config.trafficClass = defaults.trafficClass;
    if (config.version < 22700) {
        config.collnetEnable = defaults.collnetEnable;
        config.CTAPolicy = defaults.CTAPolicy;
        config.shrinkShare = defaults.shrinkShare;
        config.nvlsCTAs = defaults.nvlsCTAs;
    }
    if (config.version < 22800) {
        config.nChannelsPerNetPeer = defaults.nChannelsPerNetPeer;
        config.nvlinkCentricSched = defaults.nvlinkCentricSched;
    }
    if (config.version < 22900) {
        config.graphUsageMode = defaults.graphUsageMode;
        config.numRmaCtx = defaults.numRmaCtx;
    }
    if (config.version < 23000) config.maxP2pPeers = config.graphStreamOrdering = INT_MIN;
    if (config.blocking != 0) return failed(InvalidArgument, "config: blocking");
    // Whatever is not asked for is the default, or it was read from where nothing was written.
    config.blocking = defaults.blocking;
    config.size = defaults.size;
    config.version = defaults.version;
    if (memcmp(&config, &defaults, sizeof(config)) != 0) return failed(InvalidArgument, "config: not the defaults");
    return Success;
}

template <class T>
void add(Operation& operation) {
    for (size_t i = 0; i < operation.count; i++) {
        T sum = 0;
        for (auto& [rank, buffer] : operation.buffers) sum += static_cast<T*>(buffer)[i];
        for (auto& [rank, buffer] : operation.buffers) static_cast<T*>(buffer)[i] = sum;
    }
}

size_t width(int type) { return type == 7 ? 4 : type == 8 ? 8 : 2; }

float widened(uint16_t bf16) {
    uint32_t bits = uint32_t(bf16) << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

void perform(Operation& operation) {
    if (!operation.sum) {
        void* from = operation.buffers[operation.root];
        for (auto& [rank, to] : operation.buffers)
            if (to != from) memcpy(to, from, operation.count * width(operation.type));
    } else if (operation.type == 7) {
        add<float>(operation);
    } else if (operation.type == 8) {
        add<double>(operation);
    } else {
        for (size_t i = 0; i < operation.count; i++) {
            float sum = 0;
            for (auto& [rank, buffer] : operation.buffers) sum += widened(static_cast<uint16_t*>(buffer)[i]);
            uint32_t bits;
            memcpy(&bits, &sum, 4);
            for (auto& [rank, buffer] : operation.buffers) static_cast<uint16_t*>(buffer)[i] = bits >> 16;
        }
    }
}

// A communicator's operations complete in their order, each when all ranks have enqueued it.
void advance(Clique* clique) {
    while (clique->done < clique->operations.size()) {
        Operation& operation = clique->operations[clique->done];
        if (operation.hangs || int(operation.buffers.size()) < clique->ranks) return;
        perform(operation);
        for (auto& [rank, stream] : operation.streams) stream->completed++;
        clique->done++;
    }
}

int enqueue(Comm* comm, bool sum, void* buffer, size_t count, int type, int root, Stream* stream) {
    Inside here(comm->rank);
    std::lock_guard<std::mutex> lock(mutex);
    if (!alive(comm)) return InvalidArgument;
    knobs["calls"]++;
    if (int code = ready(comm)) return comm->error = code;
    if (long code = knob("call_error", 0)) return comm->error = failed(code, "asked for by a test");
    if (type < 7 || type > 9) return comm->error = violated("a type that is not used here");
    Clique* clique = comm->clique;
    uint64_t number = comm->next++;
    char what[80];
    std::snprintf(what, sizeof(what), "%s %zu %d %d", sum ? "sum" : "copy", count, type, root);
    if (number == clique->operations.size()) {
        Operation operation;
        operation.what = what, operation.count = count, operation.type = type, operation.root = root;
        operation.sum = sum;
        operation.hangs = long(number) == knob("hang_at", -1) && knob("hang_clique", clique->number) == clique->number;
        clique->operations.push_back(operation);
    }
    Operation& operation = clique->operations[number];
    if (operation.what != what) return comm->error = failed(InvalidUsage, operation.what + " here, " + what + " there");
    operation.buffers[comm->rank] = buffer;
    operation.streams[comm->rank] = stream;
    stream->enqueued++;
    advance(clique);
    comm->polls = knob("op_polls", 0);
    return comm->polls != 0 ? InProgress : Success;
}

bool pending(Comm* comm) { return comm->clique->done < comm->next; }

// Tells the kernels to stop: they leave their streams without a result.
void stop(Comm* comm) {
    comm->stopped = true;
    for (uint64_t number = comm->clique->done; number < comm->next; number++) {
        Operation& operation = comm->clique->operations[number];
        auto found = operation.streams.find(comm->rank);
        if (found != operation.streams.end()) found->second->completed++;
        operation.hangs = true;
    }
}

// Frees what a communicator had, which on a device waits for the kernels of all others of the same rank.
void reclaim(Comm* comm) {
    bool stuck = false;
    {
        std::lock_guard<std::mutex> lock(mutex);
        for (Comm* other : comms)
            if (other->rank == comm->rank && !other->dead && !other->stopped && pending(other)) stuck = true;
        comm->dead = true;
        knobs["aborts"]++;
    }
    if (stuck) hang();
}

}  // namespace

extern "C" {

int ncclGetVersion(int* version) {
    std::lock_guard<std::mutex> lock(mutex);
    *version = knob("version", 22809);
    return Success;
}

int ncclGetUniqueId(UniqueId* id) {
    std::lock_guard<std::mutex> lock(mutex);
    uint64_t number = next_id++;
    for (int i = 0; i < 128; i++) id->internal[i] = (unsigned char)(number * 31 + i * 7);
    memcpy(id->internal, &number, 8);
    return Success;
}

int ncclCommInitRankConfig(Comm** comm, int ranks, UniqueId id, int rank, Config* config) {
    Inside here(rank);
    std::lock_guard<std::mutex> lock(mutex);
    *comm = nullptr;
    uint64_t number;
    memcpy(&number, id.internal, 8);
    for (int i = 8; i < 128; i++)
        if (id.internal[i] != (unsigned char)(number * 31 + i * 7)) return violated("an id that did not arrive whole");
    if (ranks < 1 || rank < 0 || rank >= ranks) return violated("a rank outside of the world");
    if (int code = parse(config)) return code;
    knobs["starts"]++;
    Clique*& clique = cliques[number];
    if (!clique) {
        clique = new Clique();
        clique->ranks = ranks;
        clique->number = int(cliques.size()) - 1;
    }
    if (clique->ranks != ranks) return violated("worlds of different sizes");
    clique->arrived++;
    *comm = new Comm();
    (*comm)->clique = clique, (*comm)->rank = rank, (*comm)->polls = knob("init_polls", 0);
    comms.push_back(*comm);
    return InProgress;
}

int ncclCommGetAsyncError(Comm* comm, int* state) {
    Inside here(comm->rank);
    std::lock_guard<std::mutex> lock(mutex);
    if (!alive(comm)) return InvalidArgument;
    *state = state_of(comm);
    return Success;
}

int ncclAllReduce(const void* from, void* to, size_t count, int type, int operation, Comm* comm, Stream* stream) {
    if (from != to || operation != 0) return InvalidArgument;
    return enqueue(comm, true, to, count, type, -1, stream);
}

int ncclBroadcast(const void* from, void* to, size_t count, int type, int root, Comm* comm, Stream* stream) {
    if (from != to) return InvalidArgument;
    return enqueue(comm, false, to, count, type, root, stream);
}

int ncclCommFinalize(Comm* comm) {
    Inside here(comm->rank);
    std::lock_guard<std::mutex> lock(mutex);
    if (!alive(comm)) return InvalidArgument;
    if (int code = ready(comm)) return comm->error = code;
    if (comm->finalizing || comm->finalized) return comm->error = violated("finalized twice");
    comm->finalizing = true;
    comm->clique->finalized++;
    comm->polls = knob("finalize_polls", 0);
    return InProgress;
}

int ncclCommDestroy(Comm* comm) {
    Inside here(comm->rank);
    std::lock_guard<std::mutex> lock(mutex);
    if (!alive(comm)) return InvalidArgument;
    if (int code = ready(comm)) return code;
    if (!comm->finalized) return violated("destroyed without an end");
    comm->dead = true;
    knobs["destroys"]++;
    return Success;
}

int ncclCommAbort(Comm* comm) {
    Inside here(comm->rank);
    bool hangs;
    {
        std::lock_guard<std::mutex> lock(mutex);
        if (!alive(comm)) return InvalidArgument;
        stop(comm);
        hangs = knob("abort_hangs", 0) != 0;
    }
    if (hangs) hang();
    if (group_depth > 0) {
        std::lock_guard<std::mutex> lock(mutex);
        knobs["together"]++;
        group_aborts.push_back(comm);
    } else {
        reclaim(comm);
    }
    return Success;
}

int ncclGroupStart() {
    group_depth++;
    return Success;
}

int ncclGroupEnd() {
    if (group_depth == 0) return InvalidUsage;
    if (--group_depth == 0) {
        for (Comm* comm : group_aborts) reclaim(comm);
        group_aborts.clear();
    }
    return Success;
}

const char* ncclGetErrorString(int code) {
    static const char* texts[] = {"no error", "unhandled cuda error", "unhandled system error", "internal error",
                                  "invalid argument", "invalid usage", "remote process exited or there was a network error",
                                  "NCCL operation in progress"};
    return code >= 0 && code < 8 ? texts[code] : "unknown result code";
}

const char* ncclGetLastError(Comm*) {
    static thread_local std::string copy;
    std::lock_guard<std::mutex> lock(mutex);
    copy = last_error;
    return copy.c_str();
}

// For the tests.

void fake_set(const char* name, long value) {
    std::lock_guard<std::mutex> lock(mutex);
    knobs[name] = value;
}

long fake_get(const char* name) {
    std::lock_guard<std::mutex> lock(mutex);
    return knob(name, 0);
}

Stream* fake_stream() { return new Stream(); }
uint64_t fake_record(Stream* stream) { return stream->enqueued; }
int fake_passed(Stream* stream, uint64_t point) { return stream->completed >= point; }

}
