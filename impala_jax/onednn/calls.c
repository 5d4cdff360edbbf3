/* Runs oneDNN's primitives for XLA on CPU: the one part that cannot be Python.

   XLA calls `impala_jax_onednn_call` on threads of its own, up to the very end of the
   process, when Python's lock can no longer be taken. What it shall run was prepared in
   Python (kernels.py) and added here as a program: primitives in order, each with the
   memories that it works on. Nothing is linked or included: oneDNN's functions come as
   pointers, XLA's structures (its `ffi/api/c_api.h`, version 0.1, which later ones
   serve) are spelled out below as far as they are needed. */

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { METADATA = 1, SCALAR = 3, INTERNAL = 13 }; /* Of XLA. */
enum { IN_ORDER = 1 };                            /* Of oneDNN. */
enum { ARGUMENTS = 8, PLACES = 16 };

/* --- XLA's side --- */

struct extension {
  size_t size;
  int type;
  struct extension *next;
};

struct version {
  size_t size;
  struct extension *extension;
  int major, minor;
};

struct metadata {
  size_t size;
  struct version version;
};

struct metadata_extension {
  struct extension base;
  struct metadata *metadata;
};

struct error_arguments {
  size_t size;
  struct extension *extension;
  const char *message;
  int code;
};

struct api {
  size_t size;
  struct extension *extension;
  struct version version;
  void *internal;
  void *(*create_error)(struct error_arguments *);
};

struct buffer {
  size_t size;
  struct extension *extension;
  int type;
  void *data;
  int64_t rank;
  int64_t *dims;
};

struct buffers {
  size_t size;
  struct extension *extension;
  int64_t count;
  int *types;
  struct buffer **buffers;
};

struct scalar {
  int type;
  int64_t *value;
};

struct attributes {
  size_t size;
  struct extension *extension;
  int64_t count;
  int *types;
  void *names;
  void **values;
};

struct frame {
  size_t size;
  struct extension *extension;
  struct api *api;
  void *context;
  int stage;
  struct buffers inputs, outputs;
  struct attributes attributes;
};

/* --- Python's side: library.py has the same structures --- */

struct functions {
  int (*memory_create)(void **, void *desc, void *engine, void *address);
  int (*memory_destroy)(void *);
  int (*execute)(void *primitive, void *stream, int count, void *arguments);
  int (*stream_create)(void **, void *engine, unsigned flags);
  int (*wait)(void *stream);
  void (*set_threads)(int); /* May be null. */
  void *engine;
  int threads;
};

struct argument {
  int number; /* DNNL_ARG_... */
  int place;  /* Inputs first, then outputs. */
  void *desc;
};

struct step {
  void *primitive;
  int count;
  struct argument arguments[ARGUMENTS];
};

struct program {
  int64_t id;
  int count;
  struct step *steps;
  struct program *next;
};

static struct functions dnnl;
static struct program *programs; /* Only ever grows, at its head. */
static pthread_mutex_t adding = PTHREAD_MUTEX_INITIALIZER;

/* --- Running --- */

struct execution_argument {
  int number;
  void *memory;
};

static __thread void *stream; /* They are not said to be safe to share. */

static int run_step(const struct step *step, void **addresses) {
  struct execution_argument arguments[ARGUMENTS];
  int made = 0, status = 0;
  while (made < step->count && !status) {
    const struct argument *argument = &step->arguments[made];
    arguments[made].number = argument->number;
    status = dnnl.memory_create(&arguments[made].memory, argument->desc, dnnl.engine,
                                addresses[argument->place]);
    if (!status) made++;
  }
  if (!status) status = dnnl.execute(step->primitive, stream, made, arguments);
  if (!status) status = dnnl.wait(stream);
  while (made > 0) dnnl.memory_destroy(arguments[--made].memory);
  return status;
}

static int run(const struct program *program, void **addresses) {
  int status = stream ? 0 : dnnl.stream_create(&stream, dnnl.engine, IN_ORDER);
  if (dnnl.set_threads) dnnl.set_threads(dnnl.threads);
  for (int i = 0; i < program->count && !status; i++)
    status = run_step(&program->steps[i], addresses);
  return status;
}

/* OpenMP keeps threads for each thread that calls it, and XLA calls from many: one
   thread calls for all, one program at a time, which has all cores. */
static struct {
  pthread_mutex_t turn, lock;
  pthread_cond_t wanted, finished;
  const struct program *program;
  void **addresses;
  int status, started;
} caller = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_MUTEX_INITIALIZER,
            PTHREAD_COND_INITIALIZER,  PTHREAD_COND_INITIALIZER,
            NULL, NULL, 0, 0};

static void *call_for_others(void *unused) {
  (void)unused;
  pthread_mutex_lock(&caller.lock);
  for (;;) {
    while (!caller.program) pthread_cond_wait(&caller.wanted, &caller.lock);
    pthread_mutex_unlock(&caller.lock);
    int status = run(caller.program, caller.addresses);
    pthread_mutex_lock(&caller.lock);
    caller.status = status;
    caller.program = NULL;
    pthread_cond_signal(&caller.finished);
  }
  return NULL;
}

static int run_by_caller(const struct program *program, void **addresses) {
  pthread_mutex_lock(&caller.turn);
  pthread_mutex_lock(&caller.lock);
  if (!caller.started) {
    pthread_t thread;
    caller.started = !pthread_create(&thread, NULL, call_for_others, NULL);
  }
  int status;
  if (caller.started) {
    caller.program = program;
    caller.addresses = addresses;
    pthread_cond_signal(&caller.wanted);
    while (caller.program) pthread_cond_wait(&caller.finished, &caller.lock);
    status = caller.status;
  } else {
    status = run(program, addresses);
  }
  pthread_mutex_unlock(&caller.lock);
  pthread_mutex_unlock(&caller.turn);
  return status;
}

/* --- What Python and XLA call --- */

void impala_jax_onednn_use(const struct functions *functions) { dnnl = *functions; }

/* Adds a program; one of an id that is there already is left out. Returns 0 if there is
   no memory or it is too large. */
int impala_jax_onednn_add(int64_t id, const struct step *steps, int count) {
  for (int i = 0; i < count; i++) {
    if (steps[i].count > ARGUMENTS) return 0;
    for (int j = 0; j < steps[i].count; j++)
      if (steps[i].arguments[j].place >= PLACES) return 0;
  }
  struct program *program = malloc(sizeof *program);
  struct step *copy = malloc(count * sizeof *steps);
  if (!program || !copy) return 0;
  memcpy(copy, steps, count * sizeof *steps);
  program->id = id;
  program->count = count;
  program->steps = copy;
  pthread_mutex_lock(&adding);
  program->next = programs;
  programs = program;
  pthread_mutex_unlock(&adding);
  return 1;
}

static const struct program *find(int64_t id) {
  pthread_mutex_lock(&adding);
  const struct program *program = programs;
  while (program && program->id != id) program = program->next;
  pthread_mutex_unlock(&adding);
  return program;
}

static void *fail(const struct frame *frame, const char *what, int64_t number) {
  char words[128];
  snprintf(words, sizeof words, "oneDNN: %s %lld", what, (long long)number);
  struct error_arguments error = {sizeof error, NULL, words, INTERNAL};
  return frame->api->create_error(&error);
}

/* Runs the program that the attribute, the only one, names. */
void *impala_jax_onednn_call(struct frame *frame) {
  for (struct extension *e = frame->extension; e; e = e->next) {
    if (e->type == METADATA) {
      struct version *version = &((struct metadata_extension *)e)->metadata->version;
      version->major = 0;
      version->minor = 1;
      return NULL;
    }
  }
  if (frame->attributes.count != 1 || frame->attributes.types[0] != SCALAR)
    return fail(frame, "one attribute is expected, not", frame->attributes.count);
  int64_t id = *((struct scalar *)frame->attributes.values[0])->value;
  const struct program *program = find(id);
  if (!program) return fail(frame, "there is no program", id);
  int64_t inputs = frame->inputs.count, outputs = frame->outputs.count;
  if (inputs + outputs > PLACES) return fail(frame, "too many buffers:", inputs + outputs);
  void *addresses[PLACES] = {NULL};
  for (int64_t i = 0; i < inputs; i++) addresses[i] = frame->inputs.buffers[i]->data;
  for (int64_t i = 0; i < outputs; i++)
    addresses[inputs + i] = frame->outputs.buffers[i]->data;
  int status =
      dnnl.threads > 1 ? run_by_caller(program, addresses) : run(program, addresses);
  return status ? fail(frame, "a primitive ended with status", status) : NULL;
}
