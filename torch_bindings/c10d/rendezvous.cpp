// Ranks with equal identities may share a host; whether they do, they find out by trying. What is tried and what came
// of it goes through the store, so that all ranks of the group come to the same conclusion:
//
//   identity/RANK   every rank's host identity, and from rank 0 the handle of memory for the whole group, since all
//                   ranks are on one host more often than not, and that is then all that has to be said
//   N/handle/RANK   the memory that the first rank of a set made for it, in the N-th attempt
//   N/joined/RANK   whether a rank could open the memory of its set
//
// Where some ranks of a set could not, the set is divided into those that could and those that could not, and tried
// again. The rank that made the memory always could, so that each attempt leaves fewer ranks undecided.
#include "c10d/rendezvous.h"

#include <algorithm>
#include <map>
#include <string>

#include "c10d/tuning.h"

namespace sluice::c10d_backend {
namespace {

using Set = std::vector<int>;
using Sets = std::vector<Set>;
constexpr char kFailed = '!';  // begins the text of a rank that could not make memory

class Rendezvous {
 public:
  Rendezvous(::c10d::Store &store, const Member &member, Milliseconds timeout)
      : store_(store), member_(member), timeout_(timeout) {}

  Hosts find() {
    Sets sets = exchange_identities();
    bool one_host = sets.size() == 1;
    if (!one_host) communicator_.reset();
    for (int attempt = 0;; ++attempt) {
      std::string prefix = std::to_string(attempt) + "/";
      // The first attempt on one host uses what rank 0 made in advance.
      if (attempt > 0 || !one_host) handle_ = exchange_handle(prefix, own_set(sets));
      Sets divided = divide(sets, exchange_joined(prefix, own_set(sets)));
      if (divided == sets) break;
      communicator_.reset();
      sets = std::move(divided);
    }
    check_status(sl_comm_start(communicator_->get(), timeout_.count()), timeout_);
    int host = static_cast<int>(&own_set(sets) - sets.data());
    return {std::move(sets), host, std::move(communicator_)};
  }

 private:
  const Set &own_set(const Sets &sets) const {
    for (const Set &set : sets) {
      if (std::find(set.begin(), set.end(), member_.rank) != set.end()) return set;
    }
    TORCH_INTERNAL_ASSERT(false, "rank ", member_.rank, " is in no set");
  }

  int name_of(int rank) const { return member_.names.empty() ? rank : member_.names[rank]; }

  sl_comm_options options(const Set &set) {
    names_.clear();
    for (int rank : set) names_.push_back(name_of(rank));
    int place = static_cast<int>(std::find(set.begin(), set.end(), member_.rank) - set.begin());
    sl_comm_options options{};
    options.rank = place, options.size = static_cast<int>(set.size()), options.names = names_.data();
    return options;
  }

  // The handle of new memory for the set, or why there is none.
  std::string create(const Set &set) {
    sl_comm_options wanted = options(set);
    std::optional<sl_comm_tuning> tuning = find_tuning(wanted.size);
    if (tuning) wanted.tuning = &*tuning;
    sl_comm *comm = nullptr;
    char handle[SL_COMM_TEXT] = "";
    if (sl_comm_create(&wanted, &comm, handle) != SL_OK) return kFailed + std::string(sl_last_error());
    communicator_ = std::make_shared<Communicator>(comm);
    return handle;
  }

  void put(const std::string &key, const std::string &value) {
    store_.set(key, std::vector<uint8_t>(value.begin(), value.end()));
  }

  // What all ranks, or these, have put under prefix.
  std::vector<std::string> get(const std::string &prefix, const Set &ranks) {
    std::vector<std::string> keys, texts;
    for (int rank : ranks) keys.push_back(prefix + std::to_string(rank));
    try {
      for (const std::vector<uint8_t> &value : store_.multiGet(keys)) texts.emplace_back(value.begin(), value.end());
    } catch (const std::exception &error) {
      C10_THROW_ERROR(DistStoreError,
                      c10::str("sluice: while a process group of ", member_.size,
                               " ranks was created, nothing came from rank ", absent(keys, ranks), ". ", error.what()));
    }
    return texts;
  }

  std::string absent(const std::vector<std::string> &keys, const Set &ranks) {
    std::string text;
    for (size_t i = 0; i < keys.size(); ++i) {
      if (store_.check({keys[i]})) continue;
      text += (text.empty() ? "" : ", ") + std::to_string(name_of(ranks[i]));
    }
    return text.empty() ? "0 to " + std::to_string(member_.size - 1) + " in time" : text;
  }

  Set all_ranks() const {
    Set ranks;
    for (int rank = 0; rank < member_.size; ++rank) ranks.push_back(rank);
    return ranks;
  }

  Sets exchange_identities() {
    char identity[SL_COMM_TEXT] = "";
    check_status(sl_comm_host_identity(identity), timeout_);
    std::string text = identity;
    if (member_.rank == 0) text += '\0' + create(all_ranks());
    if (member_.size == 1) {
      handle_ = text.substr(text.find('\0') + 1);
      return {all_ranks()};
    }
    put("identity/" + std::to_string(member_.rank), text);
    std::vector<std::string> texts = get("identity/", all_ranks());
    size_t end = texts[0].find('\0');
    handle_ = texts[0].substr(end + 1);
    texts[0].resize(end);
    Sets sets;
    std::map<std::string, size_t> places;
    for (int rank = 0; rank < member_.size; ++rank) {
      auto [place, added] = places.emplace(texts[rank], sets.size());
      if (added) sets.emplace_back();
      sets[place->second].push_back(rank);
    }
    return sets;
  }

  std::string exchange_handle(const std::string &prefix, const Set &set) {
    std::string key = prefix + "handle/";
    if (set[0] != member_.rank) return get(key, {set[0]})[0];
    std::string handle = create(set);
    if (set.size() > 1) put(key + std::to_string(member_.rank), handle);
    return handle;
  }

  // Which ranks of the group could open the memory of their set; throws on all where one could not be made, or mapped.
  std::vector<bool> exchange_joined(const std::string &prefix, const Set &set) {
    std::string problem;
    if (handle_.front() == kFailed) {
      problem = handle_;
    } else if (set[0] != member_.rank) {
      sl_comm_options wanted = options(set);
      sl_comm *comm = nullptr;
      sl_status status = sl_comm_join(&wanted, handle_.c_str(), &comm);
      if (status == SL_OK) {
        communicator_ = std::make_shared<Communicator>(comm);
      } else if (status == SL_UNSUPPORTED) {
        problem = sl_last_error();
      } else {  // it is this host, but something is in short supply here
        problem = kFailed + ("rank " + std::to_string(name_of(member_.rank)) + ": ") + sl_last_error();
      }
    }
    std::vector<std::string> problems = {problem};
    if (member_.size > 1) {
      put(prefix + "joined/" + std::to_string(member_.rank), problem.empty() ? " " : problem);
      problems = get(prefix + "joined/", all_ranks());
    }
    std::vector<bool> joined;
    for (const std::string &text : problems) {
      if (text[0] == kFailed) C10_THROW_ERROR(DistBackendError, "sluice: " + text.substr(1));
      joined.push_back(text == " " || text.empty());
    }
    return joined;
  }

  static Sets divide(const Sets &sets, const std::vector<bool> &joined) {
    Sets divided;
    for (const Set &set : sets) {
      Set parts[2];
      for (int rank : set) parts[joined[rank] ? 0 : 1].push_back(rank);
      for (Set &part : parts) {
        if (!part.empty()) divided.push_back(std::move(part));
      }
    }
    return divided;
  }

  ::c10d::Store &store_;
  const Member &member_;
  const Milliseconds timeout_;
  std::string handle_;
  std::vector<int> names_;
  CommunicatorPtr communicator_;
};

}  // namespace

StorePtr begin_generation(const StorePtr &store, const Member &member) {
  if (member.size == 1) return store;
  int64_t generation = store->add("generation/" + std::to_string(member.rank), 1);
  return c10::make_intrusive<::c10d::PrefixStore>("generation " + std::to_string(generation), store);
}

Hosts find_hosts(::c10d::Store &store, const Member &member, Milliseconds timeout) {
  return Rendezvous(store, member, timeout).find();
}

}  // namespace sluice::c10d_backend
