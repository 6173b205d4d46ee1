// Attention over a shared memory and each sequence's own rows, in one pass over the keys (online softmax).
//
// The query rows of a (pool, key/value head), X = N * T * H/G of them for the pool's N sequences, see the same memory
// rows. So a block of keys and values is packed once and multiplied with many query rows, ROWS at a time in registers.
// A task takes some query rows, of one head or, where a head has few rows, of several, and a range of keys. Where the
// keys of a query row are split over tasks, the partial results are combined in the order of the keys.
#include "attention_few.h"
#include "attention_task.h"
#include "attention_tile.h"
#include "buffer.h"
#include "kernels.h"

namespace memkernel {
namespace MEMKERNEL_ISA {
namespace {

constexpr int64_t TASK_ROWS = 256;        // about as many query rows, over all heads of a task
constexpr int64_t SOME_ROWS = 48;         // up to here memory is read more evenly in smaller blocks
constexpr int64_t KEYS_OF_SOME = 128;
constexpr int64_t KEYS_OF_MANY = 256;
constexpr int64_t KEYS_OF_TILE = 16;      // of a block, which all heads read before they go on, where none packs it
constexpr int64_t KEYS_AHEAD = 24;        // that are fetched into the second cache level, where none packs them
constexpr int64_t SUM_STEPS = 32;         // of a score's sum, for a smaller rounding error than that of one long sum
static_assert(KEYS_OF_TILE % (2 * QUAD) == 0 && KEYS_OF_SOME % KEYS_OF_TILE == 0);
static_assert(KEYS_OF_SOME % PANEL == 0 && KEYS_OF_MANY % PANEL == 0);

thread_local Buffer scratch_buffer;
thread_local Buffer partial_buffer;

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
    packs = max_rows > FEW_ROWS || a.D % PANEL != 0;
    registers = packs ? 0 : ceil_div(max_rows, QUADS);
    block_keys = max_rows > SOME_ROWS ? KEYS_OF_MANY : KEYS_OF_SOME;
    weight_words = block_keys / PER_WORD<Scalar>;
    splits = choose_splits(tasks(), ceil_div(a.M + a.S, KEYS_OF_MANY), threads.count);
    if (splits > 1) partials = partial_buffer.reserve<float>(tasks() * splits * partial_size());
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
  int64_t row_blocks, max_rows, head_blocks, max_heads;  // of the tasks
  bool packs;                 // a block's keys and values before they are multiplied
  int64_t registers;          // that hold QUAD numbers of each of a head's few rows
  int64_t splits;             // of the keys of a task
  int64_t block_keys;         // multiplied at a time
  int64_t weight_words;       // of a query row, for a block of keys
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
    return at(a.query, b * a.query_B + t * a.query_T + (head * Q + x % Q) * a.D);
  }

  Scalar* out_row(const Task& task, int64_t head, int64_t x) const {
    const int64_t bt = task.pool * N * a.T + x / Q;
    return static_cast<Scalar*>(a.out) + (bt * a.H + head * Q + x % Q) * a.D;
  }

  static const Scalar* at(const void* data, int64_t offset) {
    return static_cast<const Scalar*>(data) + offset;
  }

  Segment<Scalar> memory(const Task& task) const {
    return {at(a.memory_key, task.pool * a.memory_key_P),
            at(a.memory_value, task.pool * a.memory_value_P),
            a.memory_key_M,
            a.memory_value_M,
            task.first,
            task.first + task.rows,
            a.M,
            a.M,
            Q};
  }

  // The cache of sequence n of the pool, as far as the task's last query row of this sequence sees.
  Segment<Scalar> own(const Task& task, int64_t n) const {
    const int64_t b = task.pool * N + n;
    const int64_t first = max(task.first, n * a.T * Q);
    const int64_t last = min(task.first + task.rows, (n + 1) * a.T * Q);
    const int64_t seen_by_0 = a.start[b] + 1 - n * a.T;
    return {at(a.key, b * a.key_B),
            at(a.value, b * a.value_B),
            a.key_S,
            a.value_S,
            first,
            last,
            min(a.S, seen_by_0 + (last - 1) / Q),
            seen_by_0,
            Q};
  }

  void attend(int64_t i) {
    const Task task = this->task(i / splits);
    const Scratch scratch = this->scratch(i);
    start(task, scratch);
    attend_segments(task, i % splits, scratch);
    if (!packs) finish_few(task, scratch);
    if (splits > 1) return;
    for (int64_t h = 0; h < task.heads; h++) write_head(task, h, scratch.result);
  }

  // Parts of the thread's buffer, where the result is of one split.
  Scratch scratch(int64_t i) const {
    const int64_t rows = max_heads * max_rows;
    const int64_t lanes = max_heads * registers * LANES;
    Scratch scratch;
    const struct {
      float** part;
      int64_t size;
    } parts[] = {
        {&scratch.query, packs ? rows * round_up(words, LANES) : lanes * words / QUAD},
        {&scratch.key, packs ? words * block_keys : 0},
        {&scratch.value, packs ? columns * weight_words : 0},
        {&scratch.score, packs ? ROWS * block_keys : lanes * block_keys / QUAD},
        {&scratch.weight, packs ? ROWS * weight_words : registers * KEYS_OF_TILE * QUADS},
        {&scratch.rescale, packs ? round_up(ROWS, LANES) : 0},
        {&scratch.few_softmax, FewSoftmax<Scalar>::PARTS * lanes},
        {&scratch.added, packs ? 0 : rows * columns},
        {&scratch.result, splits > 1 ? 0 : partial_size()},
    };
    int64_t size = 0;
    for (const auto& part : parts) size += part.size;
    float* buffer = scratch_buffer.reserve<float>(size);
    for (const auto& part : parts) {
      *part.part = buffer;
      buffer += part.size;
    }
    if (splits > 1) scratch.result = partials + i * partial_size();
    scratch.softmax = reinterpret_cast<Softmax*>(scratch.result);
    scratch.sum = scratch.result + 2 * rows;
    return scratch;
  }

  void start(const Task& task, const Scratch& scratch) const {
    // Of few rows a register may have places for more.
    if (!packs) __builtin_memset(scratch.query, 0, task.heads * words * registers * QUADS * sizeof(float));
    for (int64_t h = 0; h < task.heads; h++) {
      for (int64_t x = 0; x < task.rows; x++) {
        const int64_t row = h * max_rows + x;
        const Scalar* const from = query_row(task, task.head + h, task.first + x);
        for (int64_t word = 0; word < words; word += LANES) {
          const f32x numbers = load_words(from + word * PER_WORD<Scalar>, words - word);
          if (packs) {
            store(scratch.query + row * round_up(words, LANES) + word, numbers);
          } else if (max_rows == 1) {
            store(few_queries(scratch, h) + word, numbers);
          } else {
            store_quads(few_queries(scratch, h) + word * registers * QUADS + x * QUAD, registers * LANES, numbers);
          }
        }
        if (packs) scratch.softmax[row] = {NEVER, 0};
        __builtin_memset(scratch.sum + row * columns, 0, columns * sizeof(float));
      }
    }
    if (!packs) {
      for (int64_t h = 0; h < task.heads; h++) few_softmax(scratch, h).start();
    }
  }

  // The keys of a task in a row: the memory, then the own rows of each of its sequences. A split is a range of these.
  void attend_segments(const Task& task, int64_t split, const Scratch& scratch) const {
    const int64_t first_n = task.first / (a.T * Q);
    const int64_t last_n = (task.first + task.rows - 1) / (a.T * Q);
    int64_t total = a.M;
    for (int64_t n = first_n; n <= last_n; n++) total += own(task, n).keys;
    const int64_t begin = total * split / splits;
    const int64_t end = total * (split + 1) / splits;
    int64_t offset = 0;
    for (int64_t n = first_n - 1; n <= last_n; n++) {
      const Segment<Scalar> segment = n < first_n ? memory(task) : own(task, n);
      const int64_t last = min(end - offset, segment.keys);
      for (int64_t key = max(begin - offset, 0); key < last; key += block_keys) {
        const int64_t keys = min(block_keys, last - key);
        if (packs) {
          for (int64_t h = 0; h < task.heads; h++) attend_packed(task, h, segment, key, keys, scratch);
        } else {
          attend_few(task, segment, key, keys, scratch);
        }
      }
      offset += segment.keys;
    }
  }

  Rows<Scalar> rows_of(const Scalar* from, int64_t row, int64_t head, int64_t key, int64_t keys) const {
    return {from + key * row + head * a.D, row, keys, words};
  }

  // All query rows of the task, FEW_ROWS a head at most; those of other segments are hidden. The heads' rows lie side
  // by side, and all heads read a tile of keys before any goes on: so memory is asked in its own order, by the products
  // and by what they fetch ahead.
  void attend_few(const Task& task, const Segment<Scalar>& segment, int64_t key, int64_t keys,
                  const Scratch& scratch) const {
    const Rows<Scalar> key_rows = rows_of(segment.key, segment.key_row, task.head, key, keys);
    const Rows<Scalar> value_rows = rows_of(segment.value, segment.value_row, task.head, key, keys);
    Rows<Scalar> next_key_rows = key_rows;
    next_key_rows.from += keys * key_rows.row;
    score_few(task, key_rows, value_rows, scratch);
    for (int64_t h = 0; h < task.heads; h++) {
      hide_few(task, segment, key, keys, few_scores(scratch, h, 0));
      few_softmax(scratch, h).raise_max(few_scores(scratch, h, 0), round_up(keys, KEYS_OF_TILE));
    }
    const int64_t first = segment.first - task.first;
    const int64_t rows = segment.last - segment.first;
    sum_few(task, first, rows, value_rows, next_key_rows, scratch);
    for (int64_t h = 0; h < task.heads; h++) {  // once a block: a long sum has a larger error
      for (int64_t r = 0; r < rows; r++) {
        float* const sum = scratch.sum + (h * max_rows + first + r) * columns;
        const float* const added = scratch.added + (h * rows + r) * columns;
        const f32x rescale = broadcast(few_softmax(scratch, h).rescale[(first + r) * QUAD]);
        for (int64_t d = 0; d < columns; d += LANES) store(sum + d, fma(load(sum + d), rescale, load(added + d)));
      }
    }
  }

  // The block's scores, by tiles; fetches its values after its keys.
  void score_few(const Task& task, const Rows<Scalar>& keys, const Rows<Scalar>& values, const Scratch& scratch) const {
    for (int64_t k = 0; k < keys.rows; k += KEYS_OF_TILE) {
      for (int64_t h = 0; h < task.heads; h++) {
        const FewScores<Scalar> products = {few_queries(scratch, h), tile(keys, k, h), few_scores(scratch, h, k),
                                            ahead(task, keys, values, k, h)};
        run_with<0, ceil_div(FEW_ROWS, QUADS)>(max_rows > 1 ? registers : 0, products);
      }
    }
  }

  // The block's weights and its share of the sums of some rows, by tiles; fetches the next block's keys at the end.
  void sum_few(const Task& task, int64_t first, int64_t rows, const Rows<Scalar>& values, const Rows<Scalar>& next_keys,
               const Scratch& scratch) const {
    const int64_t parts = ceil_div(rows, ROWS);
    __builtin_memset(scratch.added, 0, task.heads * rows * columns * sizeof(float));
    for (int64_t k = 0; k < values.rows; k += KEYS_OF_TILE) {
      for (int64_t h = 0; h < task.heads; h++) {
        few_softmax(scratch, h).soften(few_scores(scratch, h, k), KEYS_OF_TILE, scratch.weight);
        for (int64_t part = 0; part < parts; part++) {
          const int64_t r = rows * part / parts;
          const FewSums<Scalar> products = {scratch.weight,
                                            registers,
                                            first + r,
                                            tile(values, k, h),
                                            scratch.added + (h * rows + r) * columns,
                                            columns,
                                            ahead(task, values, next_keys, k, h)};
          run_with<1, ROWS>(rows * (part + 1) / parts - r, products);
        }
      }
    }
  }

  Rows<Scalar> tile(const Rows<Scalar>& rows, int64_t key, int64_t h) const {
    return {rows.from + key * rows.row + h * a.D, rows.row, min(KEYS_OF_TILE, rows.rows - key), rows.words};
  }

  // What head h fetches while it multiplies the tile of keys from `key` on: the next head's part of the tile or, after
  // the last head, the first one's of the next tile; and its share of a tile of all heads further on. The last tiles
  // fetch from the others, which are read after these rows; what runs over an end will be read a block later.
  Ahead ahead(const Task& task, const Rows<Scalar>& rows, const Rows<Scalar>& others, int64_t key, int64_t h) const {
    const int64_t next_key = key + KEYS_OF_TILE, far_key = key + KEYS_AHEAD;
    const Scalar* const now = rows.from + key * rows.row + h * a.D;
    const Scalar* const next = h + 1 < task.heads      ? now + a.D
                               : next_key < rows.rows ? rows.from + next_key * rows.row
                                                      : others.from;
    const Scalar* const far = far_key < rows.rows ? rows.from + far_key * rows.row
                                                  : others.from + (far_key - rows.rows) * others.row;
    return {reinterpret_cast<const char*>(far + h * KEYS_OF_TILE * rows.row / task.heads),
            reinterpret_cast<int64_t>(next) - reinterpret_cast<int64_t>(now)};
  }

  float* few_scores(const Scratch& scratch, int64_t h, int64_t key) const {
    return scratch.score + (h * block_keys + key) * registers * QUADS;
  }

  float* few_queries(const Scratch& scratch, int64_t h) const {
    return scratch.query + h * words * registers * QUADS;
  }

  // Scores with keys that a row does not see, or that there are not, and those of rows of other segments: -infinity.
  void hide_few(const Task& task, const Segment<Scalar>& segment, int64_t key, int64_t keys, float* score) const {
    for (int64_t x = 0; x < task.rows; x++) {
      for (int64_t k = segment.seen(task.first + x, key, keys); k < round_up(keys, KEYS_OF_TILE); k++) {
        score[k / QUAD * registers * LANES + x * QUAD + k % QUAD] = -__builtin_inff();
      }
    }
  }

  FewSoftmax<Scalar> few_softmax(const Scratch& scratch, int64_t h) const {
    return {registers, scale, scratch.few_softmax + h * FewSoftmax<Scalar>::PARTS * registers * LANES};
  }

  void finish_few(const Task& task, const Scratch& scratch) const {
    for (int64_t h = 0; h < task.heads; h++) {
      for (int64_t x = 0; x < task.rows; x++) scratch.softmax[h * max_rows + x] = few_softmax(scratch, h).of_row(x);
    }
  }

  void attend_packed(const Task& task, int64_t h, const Segment<Scalar>& segment, int64_t key, int64_t keys,
                     const Scratch& scratch) const {
    const Rows<Scalar> key_rows = rows_of(segment.key, segment.key_row, task.head + h, key, keys);
    const Rows<Scalar> value_rows = rows_of(segment.value, segment.value_row, task.head + h, key, keys);
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
    // As many as a step reads would make the first of several row tiles wait for them all.
    const int64_t lines_of_step = PANEL * WORD_BYTES<Scalar> / LINE;
    prefetch.lines_of_step = max(1, max_rows > ROWS ? lines_of_step / 2 : lines_of_step);
    return prefetch;
  }

  void attend_tile(const Segment<Scalar>& segment, int64_t x, int64_t rows, int64_t key, int64_t keys, int64_t row,
                   const Scratch& scratch, Prefetch& next_keys, Prefetch& next_values) const {
    const int64_t query_words = round_up(words, LANES);
    const int64_t padded_keys = round_up(keys, PANEL);
    const int64_t steps = padded_keys / PER_WORD<Scalar>;
    for (int64_t k = 0; k < padded_keys; k += PANEL) {
      for (int64_t word = 0; word < words; word += SUM_STEPS) {
        const Product<Scalar, Prefetch> product = {scratch.query + row * query_words + word,
                                                   query_words * int64_t(sizeof(float)),
                                                   scratch.key + k * words + word * PANEL,
                                                   min(SUM_STEPS, words - word),
                                                   scratch.score + k,
                                                   block_keys,
                                                   word ? ONES : nullptr,
                                                   &next_keys};
        run_with<1, ROWS>(rows, product);
      }
    }
    soften_rows(segment, x, rows, key, keys, row, scratch);
    for (int64_t c = 0; c < columns; c += PANEL) {
      const Product<Scalar, Prefetch> product = {scratch.weight,
                                                 weight_words * int64_t(sizeof(float)),
                                                 scratch.value + c * steps,
                                                 steps,
                                                 scratch.sum + row * columns + c,
                                                 columns,
                                                 scratch.rescale,
                                                 &next_values};
      run_with<1, ROWS>(rows, product);
    }
  }

  // Scores with a block of keys -> weights, and the factors of earlier sums.
  void soften_rows(const Segment<Scalar>& segment, int64_t x, int64_t rows, int64_t key, int64_t keys, int64_t row,
                   const Scratch& scratch) const {
    const int64_t padded_keys = round_up(keys, PANEL);
    for (int64_t r = 0; r < rows; r++) {
      float* const score = scratch.score + r * block_keys;
      for (int64_t k = segment.seen(x + r, key, keys); k < padded_keys; k++) score[k] = -__builtin_inff();
      scratch.rescale[r] =
          soften<Scalar>(score, padded_keys, scale, scratch.softmax[row + r], scratch.weight + r * weight_words);
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
    const float scale_into = exp2(broadcast((into.max - largest) * scale))[0];
    const float scale_from = exp2(broadcast((from.max - largest) * scale))[0];
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
