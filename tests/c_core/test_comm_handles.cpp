/* What a group's memory is, and what of a handle and of the file that it names is checked before it is trusted. */
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>

#include "comm_ranks.h"

namespace {

struct Handle {
  int process = 0, file = -1;
  std::string nonce;
  explicit Handle(const std::string &text) {
    std::istringstream parts(text);
    std::string kind;
    char colon[2] = "";
    std::getline(parts, kind, ':');
    parts >> process >> colon[0] >> file >> colon[1] >> nonce;
    EXPECT_EQ(kind + colon[0] + colon[1], "memfd::") << text;
    EXPECT_FALSE(nonce.empty() || nonce.find_first_not_of("0123456789abcdef") != std::string::npos) << text;
  }
  static std::string write(int file, const std::string &nonce) {
    return "memfd:" + std::to_string(getpid()) + ":" + std::to_string(file) + ":" + nonce;
  }
};

sl_status join(const std::string &handle) {
  sl_comm_options options = {1, 2, nullptr, 0, nullptr};
  sl_comm *comm = nullptr;
  sl_status status = sl_comm_join(&options, handle.c_str(), &comm);
  sl_comm_close(comm);
  return status;
}

std::string read_text(const std::string &path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

TEST(CommMemory, IsItsOwnersAloneAndHasNoName) {
  std::string one, other;
  sl_comm *first = ranks::create(2, &one), *second = ranks::create(2, &other);
  ASSERT_TRUE(first && second) << sl_last_error();
  struct stat facts;
  ASSERT_EQ(fstat(Handle(one).file, &facts), 0);
  EXPECT_EQ(facts.st_mode & 07777, 0600u);
  EXPECT_EQ(facts.st_nlink, 0u);
  EXPECT_EQ(facts.st_uid, geteuid());
  EXPECT_EQ(fcntl(Handle(one).file, F_GETFD) & FD_CLOEXEC, FD_CLOEXEC);
  EXPECT_EQ(Handle(one).nonce.size(), 32u);
  EXPECT_NE(Handle(one).nonce, Handle(other).nonce);
  sl_comm_close(first);
  sl_comm_close(second);
}

/* The content of a group's memory after the group has gone, in files that were made in other ways. */
class ForeignFile : public testing::Test {
 protected:
  void SetUp() override {
    std::string handle;
    sl_comm *comm = ranks::create(2, &handle, 64 << 10);
    ASSERT_NE(comm, nullptr) << sl_last_error();
    nonce_ = Handle(handle).nonce;
    content_ = read_text("/proc/self/fd/" + std::to_string(Handle(handle).file));
    sl_comm_close(comm);
  }
  void TearDown() override {
    if (file_ >= 0) close(file_);
  }
  std::string make(mode_t mode = 0600, int seals = F_SEAL_SHRINK | F_SEAL_GROW) {
    if (file_ >= 0) close(file_);
    file_ = memfd_create("foreign", MFD_ALLOW_SEALING);
    EXPECT_EQ(write(file_, content_.data(), content_.size()), static_cast<ssize_t>(content_.size()));
    EXPECT_EQ(fchmod(file_, mode), 0);
    if (seals) {
      EXPECT_EQ(fcntl(file_, F_ADD_SEALS, seals), 0);
    }
    return Handle::write(file_, nonce_);
  }
  void expect_refused(const std::string &handle, const char *why) {
    EXPECT_EQ(join(handle), SL_UNSUPPORTED);
    EXPECT_NE(std::string(sl_last_error()).find(why), std::string::npos) << sl_last_error();
  }
  int file_ = -1;
  std::string nonce_, content_;
};

TEST_F(ForeignFile, AnExactCopyWouldBeTaken) { EXPECT_EQ(join(make()), SL_OK) << sl_last_error(); }

TEST_F(ForeignFile, ThatOthersMayOpenIsRefused) {
  expect_refused(make(0660), "mode 660, expected one of user");
  expect_refused(make(0604), "mode 604, expected one of user");
}

TEST_F(ForeignFile, ThatCanBeCutShortIsRefused) {
  expect_refused(make(0600, 0), "a file whose size can change");
  expect_refused(make(0600, F_SEAL_GROW), "a file whose size can change");
}

TEST_F(ForeignFile, ThatIsNoMemoryIsRefused) {
  std::unique_ptr<FILE, int (*)(FILE *)> file(tmpfile(), fclose);
  ASSERT_NE(file, nullptr);
  EXPECT_EQ(fwrite(content_.data(), 1, content_.size(), file.get()), content_.size());
  fflush(file.get());
  fchmod(fileno(file.get()), 0600);
  expect_refused(Handle::write(fileno(file.get()), nonce_), "a file whose size can change");
  int null = open("/dev/null", O_RDWR);
  expect_refused(Handle::write(null, nonce_), "expected one of user");
  close(null);
}

TEST_F(ForeignFile, ThatIsTruncatedIsRefused) {
  std::string whole = content_;
  for (size_t bytes : {whole.size() - 4096, whole.size() / 2, size_t(4096), size_t(200), size_t(1), size_t(0)}) {
    content_ = whole.substr(0, bytes);
    expect_refused(make(), bytes < 1000 ? "bytes" : "sizes contradict each other");
  }
}

/* Each number of the header in turn is another one. */
TEST_F(ForeignFile, WithAHeaderThatContradictsItselfIsRefused) {
  const std::string whole = content_;
  const struct {
    size_t offset;
    const char *why;
  } numbers[] = {{0, "not of that group"},      {12, "another version"},       {16, "not of that group"},
                 {24, "not of that group"},     {32, "contradict each other"}, {40, "contradict each other"},
                 {48, "contradict each other"}, {56, "contradict each other"}, {64, "contradict each other"},
                 {72, "contradict each other"}};
  for (auto number : numbers) {
    for (unsigned char byte : {0x00, 0xff}) {
      content_ = whole;
      if (number.offset == 64 && byte == 0) continue; /* a size from which on nothing is done: no contradiction */
      memset(&content_[number.offset], byte, number.offset == 12 ? 4 : 8);
      expect_refused(make(), number.why);
    }
  }
  content_ = whole;
  content_[8] = 3; /* ranks */
  EXPECT_EQ(join(make()), SL_INVALID_ARGUMENT);
  EXPECT_NE(std::string(sl_last_error()).find("options.size is 2, but the group"), std::string::npos);
}

/* In a process of its own, whose limit goes with it. */
sl_status create_with_limit(int resource, rlim_t limit, std::string *text) {
  int ends[2];
  EXPECT_EQ(pipe(ends), 0);
  pid_t process = fork();
  if (process == 0) {
    signal(SIGXFSZ, SIG_IGN);
    rlimit limits = {limit, limit};
    setrlimit(static_cast<__rlimit_resource>(resource), &limits);
    sl_comm *comm = nullptr;
    char handle[SL_COMM_TEXT];
    sl_comm_options options = {0, 4, nullptr, size_t(1) << 30, nullptr};
    sl_status status = sl_comm_create(&options, &comm, handle);
    (void)!write(ends[1], sl_last_error(), strlen(sl_last_error()));
    _exit(status);
  }
  close(ends[1]);
  char line[1024];
  for (ssize_t got; (got = read(ends[0], line, sizeof line)) > 0;) text->append(line, static_cast<size_t>(got));
  close(ends[0]);
  int status = 0;
  waitpid(process, &status, 0);
  EXPECT_TRUE(WIFEXITED(status)) << "signal " << WTERMSIG(status);
  return static_cast<sl_status>(WEXITSTATUS(status));
}

/* The number between the text's beginning and what follows; 0 if the text doesn't read so. */
unsigned long long bytes_in(const std::string &text, const std::string &beginning, const std::string &following) {
  if (text.compare(0, beginning.size(), beginning) != 0) return 0;
  char *end = nullptr;
  unsigned long long bytes = strtoull(text.c_str() + beginning.size(), &end, 10);
  return strncmp(end, following.c_str(), following.size()) == 0 ? bytes : 0;
}

TEST(CommLimits, TooLittleMemoryIsAnErrorWithWhatIsNeeded) {
  std::string text;
  EXPECT_EQ(create_with_limit(RLIMIT_FSIZE, 1 << 20, &text), SL_OUT_OF_MEMORY);
  EXPECT_GT(bytes_in(text, "", " bytes of shared memory for a group of 4 could not be had"), 4ull << 30) << text;
}

#ifndef __SANITIZE_THREAD__
#ifndef __SANITIZE_ADDRESS__ /* whose shadows are larger than any limit */
TEST(CommLimits, TooLittleAddressSpaceIsAnErrorWithWhatIsNeeded) {
  std::string text;
  EXPECT_EQ(create_with_limit(RLIMIT_AS, 1 << 30, &text), SL_OUT_OF_MEMORY);
  EXPECT_GT(bytes_in(text, "mapping ", " bytes of shared memory failed"), 4ull << 30) << text;
}
#endif
#endif

TEST(CommLimits, TooFewDescriptorsAreAnError) {
  std::string text;
  EXPECT_NE(create_with_limit(RLIMIT_NOFILE, 3, &text), SL_OK);
  EXPECT_NE(text.find("memfd_create failed: Too many open files"), std::string::npos) << text;
}

}  // namespace
