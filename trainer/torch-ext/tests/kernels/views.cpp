// The kernel that makes views, on the processor, against views that the processor's own path made: the same to the last bit.
//   views FILE
// FILE (little-endian): side, widest, views, words, bytes, words a head (64 bits each); mean and 1/std (f32); the words (32 bits); the images'
// bytes; the views (f32, [views][side][side][3]). The test that writes it is trainer/data/tests/directions.rs.

#include "emulated.h"

#define PART_views
#include "../../cpp/kernels.cu"
#include "../../cpp/views_layout.h"
#include "../../cpp/views.cu"

template <typename T>
static std::vector<T> read(std::FILE* file, size_t n) {
  std::vector<T> values(n);
  if (std::fread(values.data(), sizeof(T), n, file) != n) {
    std::printf("the file ends early\n");
    std::exit(1);
  }
  return values;
}

// Runs a kernel with fewer blocks than views, and memory that holds no numbers.
template <typename T, typename Kernel>
static std::vector<T> run(int64_t views, int64_t side, int64_t each, Kernel kernel) {
  std::vector<T> out(views * side * side * 3);
  const unsigned blocks = 3;
  const float untouched = 123.25f;
  std::vector<float> scratch(blocks * each / 4, std::nanf(""));
  scratch.resize(scratch.size() + 4096, untouched);
  launch({blocks}, {32}, [&] { kernel(reinterpret_cast<u8*>(scratch.data()), out.data()); });
  if (std::any_of(scratch.end() - 4096, scratch.end(), [&](float x) { return x != untouched; })) {
    std::printf("views of %lld pixels take more memory than they have\n", static_cast<long long>(side));
    std::exit(1);
  }
  return out;
}

template <typename T, typename Same>
static int differing(const char* name, const std::vector<T>& found, const std::vector<float>& expected, size_t len, Same same) {
  int views = 0;
  for (size_t first = 0; first < found.size(); first += len) {
    for (size_t i = first; i < first + len; ++i) {
      if (!same(found[i], expected[i])) {
        std::printf("%s: view %zu, value %zu: expected %.9g\n", name, first / len, i - first, expected[i]);
        ++views;
        break;
      }
    }
  }
  return views;
}

static uint32_t bits(float x) {
  uint32_t out;
  std::memcpy(&out, &x, 4);
  return out;
}

int main(int, char** arguments) {
  std::FILE* file = std::fopen(arguments[1], "rb");
  if (!file) return 1;
  const auto sizes = read<int64_t>(file, 6);
  if (sizes[5] != kHead) {
    std::printf("heads of %lld words\n", static_cast<long long>(sizes[5]));
    return 1;
  }
  const int64_t side = sizes[0], widest = sizes[1], views = sizes[2];
  Normalise normalise;
  const auto constants = read<float>(file, 6);
  std::copy_n(constants.data(), 3, normalise.mean);
  std::copy_n(constants.data() + 3, 3, normalise.inverse_std);
  const auto words = read<int32_t>(file, sizes[3]);
  const auto images = read<uint8_t>(file, sizes[4]);
  const size_t len = side * side * 3;
  const auto expected = read<float>(file, views * len);
  std::fclose(file);

  const int64_t each = scratch_bytes(side, widest);
  const auto of = [&](auto kernel) {
    return [&, kernel](u8* scratch, auto* out) {
      kernel(images.data(), words.data(), views, static_cast<i32>(side), static_cast<i32>(widest), normalise, scratch, each, out);
    };
  };
  int failures = differing("f32", run<float>(views, side, each, of(views_f32)), expected, len,
                           [](float a, float b) { return bits(a) == bits(b); });
  failures += differing("f64", run<double>(views, side, each, of(views_f64)), expected, len,
                        [](double a, float b) { return a == static_cast<double>(b); });
  failures += differing("bf16", run<bf16>(views, side, each, of(views_bf16)), expected, len,
                        [](bf16 a, float b) { return a.bits == bf16_bits(b); });
  std::printf("%lld views of %lld pixels, %d differ\n", static_cast<long long>(views), static_cast<long long>(side), failures);
  return failures > 0;
}
