#include "idx.h"

#include <zlib.h>

#include <algorithm>
#include <array>
#include <memory>

namespace {

constexpr std::size_t kMaxBytes = std::size_t{1} << 28;  // five times MNIST's training images
constexpr std::size_t kChunk = std::size_t{1} << 20;
constexpr std::size_t kMaxDimensions = 3;

class Reader {
 public:
  explicit Reader(const std::string& path) : path_(path), file_(gzopen(path.c_str(), "rb")) {
    if (!file_) fail("cannot be opened");
  }

  [[noreturn]] void fail(const std::string& what) const { throw IdxError(path_ + ": " + what); }

  // As many bytes as there are, up to `count`.
  std::size_t read(std::uint8_t* target, std::size_t count) {
    std::size_t done = 0;
    while (done < count) {
      const int got = gzread(file_.get(), target + done, static_cast<unsigned>(std::min(count - done, kChunk)));
      int error = Z_OK;
      const char* words = gzerror(file_.get(), &error);
      // A cut gzip stream ends like a short file, but for this code.
      if (got < 0 || error == Z_BUF_ERROR) fail(std::string("cut or corrupt: ") + words);
      if (got == 0) break;
      done += static_cast<std::size_t>(got);
    }
    return done;
  }

  void read_header(std::uint8_t* target, std::size_t count) {
    if (read(target, count) < count) fail("cut header");
  }

 private:
  struct Close {
    void operator()(gzFile file) const { gzclose(file); }
  };
  std::string path_;
  std::unique_ptr<gzFile_s, Close> file_;
};

}  // namespace

Idx read_idx(const std::string& path) {
  Reader reader(path);
  std::array<std::uint8_t, 4> magic{};
  reader.read_header(magic.data(), magic.size());
  const std::size_t dimensions = magic[3];
  if (magic[0] != 0 || magic[1] != 0 || magic[2] != 0x08 || dimensions < 1 || dimensions > kMaxDimensions)
    reader.fail("wrong magic number, expected that of an IDX file of unsigned bytes");

  Idx result;
  std::size_t announced = 1;
  std::size_t room = 1;  // an empty dimension must not hide how large the others are
  for (std::size_t d = 0; d < dimensions; ++d) {
    std::array<std::uint8_t, 4> bytes{};
    reader.read_header(bytes.data(), bytes.size());
    std::size_t size = 0;
    for (const std::uint8_t byte : bytes) size = size << 8 | byte;
    result.shape.push_back(size);
    announced *= size;
    room *= std::max<std::size_t>(size, 1);
    if (room > kMaxBytes) reader.fail("announces more than 2^28 bytes");
  }

  // Piece by piece: a short file that announces much must not cost the memory it announces.
  while (result.values.size() < announced) {
    const std::size_t before = result.values.size();
    const std::size_t wanted = std::min(announced - before, kChunk);
    result.values.resize(before + wanted);
    if (reader.read(result.values.data() + before, wanted) < wanted)
      reader.fail("cut: fewer bytes after the header than announced");
  }
  std::uint8_t more = 0;
  // This read also makes zlib compare the checksum.
  if (reader.read(&more, 1) != 0) reader.fail("more bytes after the header than announced");
  return result;
}
