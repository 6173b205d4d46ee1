// Attention over a shared memory and each sequence's own rows, in one pass over the keys (online softmax).
//
// The query rows of a (pool, key/value head), X = N * T * H/G of them for the pool's N sequences, see the same memory
// rows. So a block of keys and values is packed once and multiplied with many query rows, ROWS at a time in registers.
// A task takes some query rows, of one head or, where a head has few rows, of several, and a range of keys. Where the
// keys of a query row are split over tasks, the partial results are combined in the order of the keys.
#include <cstdlib>
#include <new>

#include "kernels.h"
#include "simd.h"

namespace memkernel {
namespace MEMKERNEL_ISA {
namespace {

constexpr int VECTORS = LANES == 16 ? 4 : 2;
constexpr int ROWS = 6;                     // ROWS x VECTORS sums fill the vector registers
constexpr int PANEL = VECTORS * LANES;      // columns of a packed operand that lie together
constexpr int64_t TASK_ROWS = 256;          // about as many query rows, over all heads of a task
constexpr int64_t FEW_ROWS = 48;
constexpr int64_t KEYS_OF_FEW = 64;         // in a block: memory is the limit, and read more evenly in small blocks
constexpr int64_t KEYS_OF_MANY = 256;       // in a block: the products are the limit
constexpr int LINE = 64;                    // bytes of a cache line
constexpr float NEVER = -3.40282347e38f;    // a maximum below any score, but finite: NEVER - NEVER is 0

// Operands of the products are 32-bit words: a float, or two bf16 where the processor multiplies and adds pairs.
template <class Scalar>
constexpr int PER_WORD = 1;

template <class Scalar>
inline f32x multiply_add(f32x a, f32x b, f32x sum) {
  return fma(a, b, sum);
}

// Words whose halves come from two rows, in the order of the columns.
template <class Scalar>
inline void store_columns(float* to, const f32x (&row)[PER_WORD<Scalar>]) {
  store(to, row[0]);
}

#if defined(__AVX512BF16__)
template <>
constexpr int PER_WORD<bf16> = 2;

template <>
inline f32x multiply_add<bf16>(f32x a, f32x b, f32x sum) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

template <>
inline void store_columns<bf16>(float* to, const f32x (&row)[2]) {
  const i32x lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  for (int half = 0; half < 2; half++) {
    const i32x index = (lane + 16 * half) * 0x10001 + (32 << 16);
    store(to + half * LANES, (f32x)_mm512_permutex2var_epi16((__m512i)row[0], (__m512i)index, (__m512i)row[1]));
  }
}
#endif

template <class Scalar>
inline f32x load_words(const Scalar* from) {
  if constexpr (PER_WORD<Scalar> == 1) return load(from);
  f32x x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}

// The first `words` words, zeros after them.
template <class Scalar>
inline f32x load_words(const Scalar* from, int64_t words) {
  if (words >= LANES) return load_words(from);
  Scalar buffer[LANES * PER_WORD<Scalar>] = {};
  __builtin_memcpy(buffer, from, words * PER_WORD<Scalar> * sizeof(Scalar));
  return load_words(buffer);
}

// The rows of a block that belong to one key/value head.
template <class Scalar>
struct Rows {
  const Scalar* from;
  int64_t row, rows, words;

  bool has(int64_t i, int64_t word) const {
    return i < rows && word + LANES <= words;
  }

  // LANES words of row i; if CHECKED, with zeros for missing ones.
  template <bool CHECKED>
  f32x part(int64_t i, int64_t word) const {
    const Scalar* const source = from + i * row + word * PER_WORD<Scalar>;
    if (!CHECKED) return load_words(source);
    return i < rows ? load_words(source, words - word) : f32x{};
  }
};

template <bool CHECKED, class Scalar>
inline void pack_key_tile(const Rows<Scalar>& keys, int64_t key, int64_t word, float* to) {
  f32x tile[LANES];
  for (int i = 0; i < LANES; i++) tile[i] = keys.template part<CHECKED>(key + i, word);
  transpose(tile);
  const int64_t count = CHECKED ? min(LANES, keys.words - word) : LANES;
  for (int i = 0; i < count; i++) store(to + i * PANEL, tile[i]);
}

// Keys as the right operand of query * key^T: [panel of keys][word of D][PANEL].
template <class Scalar>
__attribute__((noinline)) void pack_keys(const Rows<Scalar>& keys, float* to) {
  for (int64_t key = 0; key < round_up(keys.rows, PANEL); key += LANES) {
    float* const panel = to + key / PANEL * PANEL * keys.words + key % PANEL;
    for (int64_t word = 0; word < keys.words; word += LANES) {
      const bool whole = keys.has(key + LANES - 1, word);
      if (whole) {
        pack_key_tile<false>(keys, key, word, panel + word * PANEL);
      } else {
        pack_key_tile<true>(keys, key, word, panel + word * PANEL);
      }
    }
  }
}

template <bool CHECKED, class Scalar>
inline void pack_value_step(const Rows<Scalar>& values, int64_t step, int64_t word, float* to) {
  f32x row[PER_WORD<Scalar>];
  for (int i = 0; i < PER_WORD<Scalar>; i++) row[i] = values.template part<CHECKED>(step * PER_WORD<Scalar> + i, word);
  store_columns<Scalar>(to, row);
}

// Values as the right operand of weight * value: [panel of D][word of keys][PANEL].
template <class Scalar>
__attribute__((noinline)) void pack_values(const Rows<Scalar>& values, float* to) {
  const int64_t steps = round_up(values.rows, PANEL) / PER_WORD<Scalar>;
  for (int64_t word = 0; word < values.words; word += LANES) {
    const int64_t column = word * PER_WORD<Scalar>;
    float* const panel = to + column / PANEL * PANEL * steps + column % PANEL;
    const int64_t whole = values.has(0, word) ? values.rows / PER_WORD<Scalar> : 0;
    for (int64_t step = 0; step < whole; step++) pack_value_step<false>(values, step, word, panel + step * PANEL);
    for (int64_t step = whole; step < steps; step++) pack_value_step<true>(values, step, word, panel + step * PANEL);
  }
}

// Rows to be packed next. The products fetch them line by line as they go, so that memory is never idle.
struct Prefetch {
  const char* row;
  int64_t row_bytes, row_lines;
  int64_t lines;  // left, of all rows
  int64_t line = 0;

  void fetch(int count) {
    if (lines <= 0) return;
    lines -= count;
    for (int i = 0; i < count; i++) {
      __builtin_prefetch(row + line * LINE, 0, 2);
      line++;
      row += line == row_lines ? row_bytes : 0;
      line = line == row_lines ? 0 : line;
    }
  }
};

// c = scale * c + a * b, or a * b without scale; a [rows, steps], b [steps, PANEL] in words, c [rows, PANEL].
struct Product {
  const float* a;
  int64_t a_row;
  const float* b;
  int64_t steps;
  float* c;
  int64_t c_row;
  const float* scale;
  Prefetch* next;
};

// The product is summed apart from c: a long sum in blocks has a much smaller rounding error.
template <class Scalar, int rows>
void multiply_tile(const Product& product) {
  constexpr int lines_of_step = max(1, PANEL * PER_WORD<Scalar> * sizeof(Scalar) / LINE);
  const auto [a, a_row, b, steps, c, c_row, scale, next] = product;
  Prefetch prefetch = *next;
  f32x sum[rows][VECTORS];
  for (int r = 0; r < rows; r++) {
    for (int v = 0; v < VECTORS; v++) sum[r][v] = f32x{};
  }
  int64_t step = 0;
  do {
    prefetch.fetch(lines_of_step);
    f32x part[VECTORS];
    for (int v = 0; v < VECTORS; v++) part[v] = load(b + step * PANEL + v * LANES);
    for (int r = 0; r < rows; r++) {
      const f32x word = broadcast(a[r * a_row + step]);
      for (int v = 0; v < VECTORS; v++) sum[r][v] = multiply_add<Scalar>(word, part[v], sum[r][v]);
    }
  } while (++step < steps);
  for (int r = 0; r < rows; r++) {
    for (int v = 0; v < VECTORS; v++) {
      float* const to = c + r * c_row + v * LANES;
      store(to, scale ? fma(load(to), broadcast(scale[r]), sum[r][v]) : sum[r][v]);
    }
  }
  *next = prefetch;
}

template <class Scalar>
void multiply(int64_t rows, const Product& product) {
  static constexpr void (*tile[ROWS])(const Product&) = {multiply_tile<Scalar, 1>, multiply_tile<Scalar, 2>,
                                                         multiply_tile<Scalar, 3>, multiply_tile<Scalar, 4>,
                                                         multiply_tile<Scalar, 5>, multiply_tile<Scalar, 6>};
  tile[rows - 1](product);
}

// The running softmax of a query row: exponents are in base 2, relative to the largest so far.
struct Softmax {
  float max, sum;
};

// Scores -> weights 2^(score * scale - max). Returns the factor that brings earlier results to the new maximum.
template <class Scalar>
float soften(const float* score, int64_t keys, float scale, Softmax& row, float* weight) {
  f32x largest = load(score);
  for (int64_t i = LANES; i < keys; i += LANES) largest = max(largest, load(score + i));
  const float before = row.max;
  const float block_max = max_lane(largest) * scale;
  if (!(block_max <= before)) row.max = block_max;
  f32x sum = {};
  for (int64_t i = 0; i < keys; i += LANES) {
    const f32x x = exp2(fma(load(score + i), broadcast(scale), broadcast(-row.max)));
    if constexpr (PER_WORD<Scalar> == 2) {
      bf16* const rounded = reinterpret_cast<bf16*>(weight) + i;
      store(rounded, x);
      sum += load(rounded);
    } else {
      store(weight + i, x);
      sum += x;
    }
  }
  const float rescale = row.max == before ? 1 : exp2(broadcast(before - row.max))[0];
  row.sum = row.sum * rescale + sum_lanes(sum);
  return rescale;
}

struct Buffer {
  float* data = nullptr;
  int64_t size = 0;

  ~Buffer() {
    std::free(data);
  }

  float* reserve(int64_t floats) {
    if (floats > size) {
      std::free(data);
      size = round_up(floats, 16);
      data = static_cast<float*>(std::aligned_alloc(64, size * sizeof(float)));
      if (!data) throw std::bad_alloc();
    }
    return data;
  }
};

thread_local Buffer scratch_buffer;
thread_local Buffer partial_buffer;

// The rows of keys and values that query rows [first, last) of a task see: row x sees those before seen(x).
template <class Scalar>
struct Segment {
  const Scalar *key, *value;
  int64_t key_row, value_row;
  int64_t first, last;
  int64_t rows;
  int64_t seen_by_0;
  int64_t rows_of_token;

  int64_t seen(int64_t x) const {
    return min(rows, seen_by_0 + x / rows_of_token);
  }
};

struct Task {
  int64_t pool;
  int64_t head, heads;  // first key/value head and their number
  int64_t first, rows;  // query rows of each head
};

struct Scratch {
  float *query, *key, *value;  // packed
  float *score, *weight;       // of ROWS query rows to a block of keys
  Softmax* softmax;            // the result so far, of all heads and rows
  float* out;
};

template <class Scalar>
class Attention {
 public:
  Attention(const MemoryAttention& arguments, const Threads& threads) : a(arguments) {
    Q = a.H / a.G;
    N = a.B / a.P;
    X = N * a.T * Q;
    scale = 1.44269504f / __builtin_sqrtf(static_cast<float>(a.D));
    words = a.D / PER_WORD<Scalar>;
    columns = round_up(a.D, PANEL);
    max_rows = ceil_div(X, ceil_div(X, TASK_ROWS));
    row_blocks = ceil_div(X, max_rows);
    max_heads = ceil_div(a.G, ceil_div(a.G, max(1, TASK_ROWS / X)));
    head_blocks = ceil_div(a.G, max_heads);
    block_keys = max_rows > FEW_ROWS ? KEYS_OF_MANY : KEYS_OF_FEW;
    splits = choose_splits(tasks(), ceil_div(a.M + a.S, KEYS_OF_MANY), threads.count);
    if (splits > 1) partials = partial_buffer.reserve(tasks() * splits * partial_size());
  }

  void run(const Threads& threads) {
    const auto attend = [](void* self, int64_t i) { static_cast<Attention*>(self)->attend(i); };
    const auto combine = [](void* self, int64_t i) { static_cast<Attention*>(self)->combine(i); };
    threads.parallel(tasks() * splits, attend, this);
    if (splits > 1) threads.parallel(tasks() * max_heads, combine, this);
  }

 private:
  const MemoryAttention& a;
  int64_t Q, N, X;            // query heads of a key/value head, sequences of a pool, query rows of a key/value head
  float scale;                // of scores, to exponents in base 2
  int64_t words, columns;     // of a packed query row, of a row of sums
  int64_t row_blocks, max_rows, head_blocks, max_heads;
  int64_t splits;             // of the keys of a task
  int64_t block_keys;
  float* partials = nullptr;  // of each task, and of each of its splits

  // The fewest splits that keep nine in ten threads busy, if all tasks take the same time.
  static int64_t choose_splits(int64_t tasks, int64_t limit, int64_t threads) {
    int64_t splits = 1;
    while (splits < limit && 10 * tasks * splits < 9 * round_up(tasks * splits, threads)) splits++;
    return splits;
  }

  int64_t tasks() const {
    return a.P * head_blocks * row_blocks;
  }

  // Of a task's result: for each head and row the softmax, then for each head and row the weighted sum of values.
  int64_t partial_size() const {
    return max_heads * max_rows * (2 + columns);
  }

  Task task(int64_t i) const {
    Task task;
    task.first = i % row_blocks * max_rows;
    task.rows = min(max_rows, X - task.first);
    task.head = i / row_blocks % head_blocks * max_heads;
    task.heads = min(max_heads, a.G - task.head);
    task.pool = i / row_blocks / head_blocks;
    return task;
  }

  const Scalar* query_row(const Task& task, int64_t head, int64_t x) const {
    const int64_t b = task.pool * N + x / (a.T * Q);
    const int64_t t = x / Q % a.T;
    return static_cast<const Scalar*>(a.query) + b * a.query_B + t * a.query_T + (head * Q + x % Q) * a.D;
  }

  Scalar* out_row(const Task& task, int64_t head, int64_t x) const {
    const int64_t bt = task.pool * N * a.T + x / Q;
    return static_cast<Scalar*>(a.out) + (bt * a.H + head * Q + x % Q) * a.D;
  }

  Segment<Scalar> memory(const Task& task) const {
    Segment<Scalar> segment;
    segment.key = static_cast<const Scalar*>(a.memory_key) + task.pool * a.memory_key_P;
    segment.value = static_cast<const Scalar*>(a.memory_value) + task.pool * a.memory_value_P;
    segment.key_row = a.memory_key_M;
    segment.value_row = a.memory_value_M;
    segment.first = task.first;
    segment.last = task.first + task.rows;
    segment.rows = a.M;
    segment.seen_by_0 = a.M;
    segment.rows_of_token = Q;
    return segment;
  }

  Segment<Scalar> own_rows(const Task& task, int64_t n) const {
    const int64_t b = task.pool * N + n;
    Segment<Scalar> segment;
    segment.key = static_cast<const Scalar*>(a.key) + b * a.key_B;
    segment.value = static_cast<const Scalar*>(a.value) + b * a.value_B;
    segment.key_row = a.key_S;
    segment.value_row = a.value_S;
    segment.first = max(task.first, n * a.T * Q);
    segment.last = min(task.first + task.rows, (n + 1) * a.T * Q);
    segment.rows = a.S;
    segment.seen_by_0 = a.start[b] + 1 - n * a.T;
    segment.rows_of_token = Q;
    segment.rows = segment.seen(segment.last - 1);
    return segment;
  }

  void attend(int64_t i) {
    const Task task = this->task(i / splits);
    const int64_t heads_rows = max_heads * max_rows;
    const int64_t sizes[] = {heads_rows * round_up(words, LANES), words * KEYS_OF_MANY,
                             columns * KEYS_OF_MANY / PER_WORD<Scalar>, ROWS * KEYS_OF_MANY,
                             ROWS * KEYS_OF_MANY / PER_WORD<Scalar>, partial_size()};
    float* next = scratch_buffer.reserve(sizes[0] + sizes[1] + sizes[2] + sizes[3] + sizes[4] + sizes[5]);
    Scratch scratch;
    scratch.query = take(next, sizes[0]);
    scratch.key = take(next, sizes[1]);
    scratch.value = take(next, sizes[2]);
    scratch.score = take(next, sizes[3]);
    scratch.weight = take(next, sizes[4]);
    float* const partial = splits > 1 ? partials + i * partial_size() : take(next, sizes[5]);
    scratch.softmax = reinterpret_cast<Softmax*>(partial);
    scratch.out = partial + 2 * heads_rows;
    start(task, scratch);
    attend_segments(task, i % splits, scratch);
    if (splits > 1) return;
    for (int64_t h = 0; h < task.heads; h++) write_head(task, h, partial);
  }

  static float* take(float*& next, int64_t size) {
    next += size;
    return next - size;
  }

  void start(const Task& task, const Scratch& scratch) const {
    for (int64_t h = 0; h < task.heads; h++) {
      for (int64_t x = 0; x < task.rows; x++) {
        const Scalar* const from = query_row(task, task.head + h, task.first + x);
        const int64_t row = h * max_rows + x;
        for (int64_t word = 0; word < words; word += LANES) {
          store(scratch.query + row * round_up(words, LANES) + word,
                load_words(from + word * PER_WORD<Scalar>, words - word));
        }
        scratch.softmax[row] = {NEVER, 0};
        __builtin_memset(scratch.out + row * columns, 0, columns * sizeof(float));
      }
    }
  }

  // The keys of a task in a row: the memory, then the own rows of each of its sequences. A split is a range of these.
  void attend_segments(const Task& task, int64_t split, const Scratch& scratch) const {
    const int64_t first_n = task.first / (a.T * Q);
    const int64_t last_n = (task.first + task.rows - 1) / (a.T * Q);
    int64_t total = a.M;
    for (int64_t n = first_n; n <= last_n; n++) total += own_rows(task, n).rows;
    const int64_t begin = total * split / splits;
    const int64_t end = total * (split + 1) / splits;
    int64_t offset = 0;
    for (int64_t n = first_n - 1; n <= last_n; n++) {
      const Segment<Scalar> segment = n < first_n ? memory(task) : own_rows(task, n);
      const int64_t last = min(end - offset, segment.rows);
      for (int64_t key = max(begin - offset, 0); key < last; key += block_keys) {
        for (int64_t h = 0; h < task.heads; h++) attend_block(task, h, segment, key, min(block_keys, last - key), scratch);
      }
      offset += segment.rows;
    }
  }

  void attend_block(const Task& task, int64_t h, const Segment<Scalar>& segment, int64_t key, int64_t keys,
                    const Scratch& scratch) const {
    const auto rows_of = [&](const Scalar* from, int64_t row) {
      return Rows<Scalar>{from + key * row + (task.head + h) * a.D, row, keys, words};
    };
    const Rows<Scalar> key_rows = rows_of(segment.key, segment.key_row);
    const Rows<Scalar> value_rows = rows_of(segment.value, segment.value_row);
    pack_keys(key_rows, scratch.key);
    pack_values(value_rows, scratch.value);
    const bool last_head = h + 1 == task.heads;
    Prefetch next_keys = after(key_rows, last_head ? block_keys : 0, last_head ? -h : 1);
    Prefetch next_values = after(value_rows, last_head ? block_keys : 0, last_head ? -h : 1);
    for (int64_t x = segment.first; x < segment.last; x += ROWS) {
      const int64_t rows = min(ROWS, segment.last - x);
      if (segment.seen(x + rows - 1) <= key) continue;
      attend_tile(segment, x, rows, key, keys, h * max_rows + x - task.first, scratch, next_keys, next_values);
    }
  }

  // The rows as many rows and heads further on.
  Prefetch after(const Rows<Scalar>& rows, int64_t further_rows, int64_t further_heads) const {
    const int64_t numbers = further_rows * rows.row + further_heads * a.D;
    Prefetch prefetch;
    prefetch.row = reinterpret_cast<const char*>(rows.from) + numbers * int64_t(sizeof(Scalar));
    prefetch.row_bytes = rows.row * sizeof(Scalar);
    prefetch.row_lines = ceil_div(a.D * sizeof(Scalar), LINE);
    prefetch.lines = rows.rows * prefetch.row_lines;
    return prefetch;
  }

  void attend_tile(const Segment<Scalar>& segment, int64_t x, int64_t rows, int64_t key, int64_t keys, int64_t row,
                   const Scratch& scratch, Prefetch& next_keys, Prefetch& next_values) const {
    const int64_t query_words = round_up(words, LANES);
    const int64_t weight_words = KEYS_OF_MANY / PER_WORD<Scalar>;
    const int64_t padded_keys = round_up(keys, PANEL);
    const int64_t steps = padded_keys / PER_WORD<Scalar>;
    for (int64_t k = 0; k < padded_keys; k += PANEL) {
      multiply<Scalar>(rows, {scratch.query + row * query_words, query_words, scratch.key + k * words, words,
                              scratch.score + k, KEYS_OF_MANY, nullptr, &next_keys});
    }
    float rescale[ROWS];
    for (int64_t r = 0; r < rows; r++) {
      float* const score = scratch.score + r * KEYS_OF_MANY;
      const int64_t seen = max(0, min(keys, segment.seen(x + r) - key));
      for (int64_t k = seen; k < padded_keys; k++) score[k] = -__builtin_inff();
      float* const weight = scratch.weight + r * weight_words;
      rescale[r] = soften<Scalar>(score, padded_keys, scale, scratch.softmax[row + r], weight);
    }
    for (int64_t c = 0; c < columns; c += PANEL) {
      multiply<Scalar>(rows, {scratch.weight, weight_words, scratch.value + c * steps, steps,
                              scratch.out + row * columns + c, columns, rescale, &next_values});
    }
  }

  void combine(int64_t i) {
    const int64_t h = i % max_heads;
    const Task task = this->task(i / max_heads);
    if (h < task.heads) write_head(task, h, partials + i / max_heads * splits * partial_size());
  }

  // Adds the splits' results to the first one's, and writes it.
  void write_head(const Task& task, int64_t h, float* partial) const {
    for (int64_t x = 0; x < task.rows; x++) {
      const int64_t row = h * max_rows + x;
      Softmax& softmax = reinterpret_cast<Softmax*>(partial)[row];
      float* const sum = partial + 2 * max_heads * max_rows + row * columns;
      for (int64_t split = 1; split < splits; split++) {
        const float* const other = partial + split * partial_size();
        merge(softmax, sum, reinterpret_cast<const Softmax*>(other)[row], sum + split * partial_size());
      }
      Scalar* const to = out_row(task, task.head + h, task.first + x);
      for (int64_t d = 0; d < a.D; d += LANES) {
        const f32x out = load(sum + d) / softmax.sum;
        a.D - d < LANES ? store_first(to + d, out, a.D - d) : store(to + d, out);
      }
    }
  }

  void merge(Softmax& into, float* sum, const Softmax& from, const float* from_sum) const {
    const float largest = into.max > from.max ? into.max : from.max;
    const float scale_into = exp2(broadcast(into.max - largest))[0];
    const float scale_from = exp2(broadcast(from.max - largest))[0];
    into = {largest, into.sum * scale_into + from.sum * scale_from};
    for (int64_t d = 0; d < columns; d += LANES) {
      store(sum + d, load(sum + d) * scale_into + load(from_sum + d) * scale_from);
    }
  }
};

}  // namespace

void memory_attention(const MemoryAttention& arguments, const Threads& threads) {
  if (arguments.B * arguments.T == 0) return;
  if (arguments.dtype == DType::float32) {
    Attention<float>(arguments, threads).run(threads);
  } else {
    Attention<bf16>(arguments, threads).run(threads);
  }
}

}  // namespace MEMKERNEL_ISA
}  // namespace memkernel
