"""What the four stages share and what is not the method: errors, artifacts, seeds, devices, metrics, LLM loading.

The one model here is the DCN recommender (Wang et al. 2017): stage 03 trains it as the surrogate Rec^s of Eq. (5), stage 04
as the recommender of Eq. (8).

Sizes used everywhere: U users, I items, N interactions, M profiles, d the LLM's embedding width, K_m codes of profile m.
"""

import argparse
import contextlib
import datetime
import errno
import hashlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import log_loss, roc_auc_score
from torch import nn

TRAIN, VALIDATION, TEST = 0, 1, 2


# ---------------------------------------------------------------- errors and the command line

class UserError(Exception):
    """Bad input. Its text is the one line the user sees: what, (where), and what to do."""

    def __init__(self, what, where, todo):
        super().__init__(f"{what} ({where}); {todo}")


def guarded(main):
    """Run a stage's main(); turn user errors into one line and exit 2, an interrupt into exit 130."""
    try:
        main()
    except UserError as error:
        sys.exit(complain(error))
    except KeyboardInterrupt:
        print("\ninterrupted: what is finished is kept; the same command goes on", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sys.exit(complain(explain(error)))


def explain(error):
    """One line for an exception that is the machine's or the user's doing; any other is a bug and raised again."""
    if is_out_of_memory(error):
        return "out of memory (this machine); take smaller settings (--block-size, --batch-users, --max-history) or a smaller --lm"
    text = str(error)
    if "No space left" in text or "File too large" in text or "PytorchStreamWriter" in text:
        return f"a file could not be written, the disk is full ({text[:80]}); free some disk space and run the same command again"
    if ranks.rank() > 0 and isinstance(error, RuntimeError):
        return f"another rank stopped (rank {ranks.rank()}: {text[:80]}); see its message"
    if not isinstance(error, OSError):
        raise error
    todo = {errno.ENOSPC: "free some disk space and run the same command again",
            errno.EACCES: "choose a folder you may write with --run", errno.EROFS: "choose a writable folder with --run",
            }.get(error.errno, "check the path and run the same command again")
    return f"{error.strerror or error} ({error.filename or 'a file of this run'}); {todo}"


def is_out_of_memory(error):
    """MemoryError, CUDA's error, and the RuntimeError that PyTorch raises on a CPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def complain(message):
    """Print the one error line; returns the exit status 2."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr)
    return 2


class Parser(argparse.ArgumentParser):
    """argparse with the three flags every stage has, and errors in one line."""

    def __init__(self, doc, device=True):
        super().__init__(description=doc.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                         allow_abbrev=False)
        self.add_argument("--run", type=Path, default=Path("runs/demo"), help="folder of this run's artifacts")
        self.add_argument("--seed", type=at_least(0), default=0, help="seed of everything random in this stage")
        if device:
            self.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one")

    def error(self, message):
        sys.exit(complain(f"{message} ({self.prog}); see: python {self.prog} --help"))


def at_least(low, kind=int):
    """argparse type: a finite number of this kind, not below `low`."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number of type {kind.__name__}") from None
        if not low <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is out of range, the smallest is {low}")
        return value
    return parse


def announce(stage, args, reads):
    """Print what a stage reads and its resolved settings."""
    print(f"[{stage}] reads {reads}")
    print(f"[{stage}] " + " ".join(f"{key}={value}" for key, value in vars(args).items() if value is not None))


# ---------------------------------------------------------------- artifacts

@contextlib.contextmanager
def atomic(path):
    """Give a temporary name beside `path`; rename it onto `path` only when the block succeeds, else remove it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_json(path, value):
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def save_npy(path, array):
    with atomic(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)


def save_torch(path, value):
    with atomic(path) as temporary:
        torch.save(value, temporary)


READERS = {".json": lambda path: json.loads(path.read_text(encoding="utf-8")),
           ".npy": lambda path: np.load(path, mmap_mode="r", allow_pickle=False),
           ".pt": lambda path: torch.load(path, map_location="cpu", weights_only=True)}
MADE_BY = {"dataset.json": "01_prepare_data.py", "interactions.npy": "01_prepare_data.py", "users.json": "01_prepare_data.py",
           "items.json": "01_prepare_data.py", "truth.npy": "01_prepare_data.py", "profiles.npy": "02_infer_profiles.py",
           "profiles.json": "02_infer_profiles.py", "profiles_users.json": "02_infer_profiles.py", "lm-tiny/tiny.json": "02_infer_profiles.py",
           "codebooks.pt": "03_quantize.py", "feature_bank.npy": "03_quantize.py", "quantize.json": "03_quantize.py"}


def load(run, name, keys=()):
    """Read an artifact of a run by its ending (.json, .npy memory-mapped, .pt); UserError when it cannot be read or lacks keys."""
    path, again = Path(run) / name, f"run: python {MADE_BY.get(name, '04_train_ctr.py')} --run {run}"
    if not path.exists():
        raise UserError(f"{name} is missing", run, again)
    try:
        value = READERS[path.suffix](path)
    except Exception as error:  # a truncated or foreign file fails in as many ways as there are formats
        raise UserError(f"{name} cannot be read: {error}", run, f"make it again, {again}") from error
    lacking = [key for key in keys if not isinstance(value, dict) or key not in value]
    if lacking:
        raise UserError(f"{name} lacks {', '.join(lacking)}", run, again)
    return value


def fingerprint(*parts):
    """SHA-256 hex digest over arrays (dtype, shape and bytes) and JSON-able values, in order."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode())
            for start in range(0, len(part), 65536):  # slices keep a memory-mapped array out of memory
                digest.update(np.ascontiguousarray(part[start:start + 65536]).tobytes())
        else:
            digest.update(json.dumps(part, sort_keys=True, ensure_ascii=False).encode())
    return digest.hexdigest()


@dataclass
class Dataset:
    """Stage 01's output in memory. interactions: int32 (N, 4) user, item, label, split."""

    interactions: np.ndarray
    users: list   # raw user id at each user index
    items: list   # {id, title, attributes: {profile name: [values]}} at each item index
    profiles: list  # {name, prompt, codes}
    task_prompt: str
    name: str = "dataset"

    def fingerprint(self):
        return fingerprint(self.interactions, self.users, self.items, self.profiles, self.task_prompt)

    def rows(self, split):
        """int32 (n, 3) user, item, label of one split, in stored (time) order."""
        return self.interactions[self.interactions[:, 3] == split][:, :3]


def load_dataset(run):
    """Read and check stage 01's artifacts. Raises UserError when they do not belong together."""
    facts = load(run, "dataset.json", ("profiles", "task_prompt", "dataset", "fingerprint"))
    dataset = Dataset(load(run, "interactions.npy"), load(run, "users.json"), load(run, "items.json"), facts["profiles"],
                      facts["task_prompt"], facts["dataset"])
    check_same(run, "interactions.npy", "dataset.json", dataset.fingerprint(), facts["fingerprint"], "01_prepare_data.py")
    users, items = dataset.interactions[:, 0], dataset.interactions[:, 1]
    if min(users.min(), items.min()) < 0 or users.max() >= len(dataset.users) or items.max() >= len(dataset.items):
        raise UserError("interactions.npy names a user or item beyond users.json or items.json", run, f"run: python 01_prepare_data.py --run {run}")
    return dataset


def load_truth(run):
    """int16 (U, M) planted profiles of a demo run, for evaluation alone; None where there are none."""
    if not (Path(run) / "truth.npy").exists():
        return None
    truth = np.array(load(run, "truth.npy"))
    check_same(run, "truth.npy", "dataset.json", fingerprint(truth), load(run, "dataset.json").get("truth_fingerprint"), "01_prepare_data.py")
    return truth


def check_same(run, artifact, source, found, expected, remedy):
    """Raise UserError unless an artifact's recorded fingerprint is that of what it is read with."""
    if found != expected:
        raise UserError(f"{artifact} was made from another {source.split('.')[0]}", run,
                        f"run: python {remedy} --run {run}")


@contextlib.contextmanager
def one_run_at_a_time(run):
    """Hold the run directory's lock; a second process is refused with a UserError. The kernel frees it when a process dies."""
    import fcntl
    Path(run).mkdir(parents=True, exist_ok=True)
    with open(Path(run) / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("another process is working on this run", run, "wait for it to end, or use another --run") from None
        yield


class ranks:  # noqa: N801 - a namespace: the processes that torchrun starts, or one process alone
    """torchrun's processes. Every function also works, and does nothing, in a single process."""

    @staticmethod
    def rank():
        return int(os.environ.get("RANK", 0))

    @staticmethod
    def count():
        return int(os.environ.get("WORLD_SIZE", 1))

    @staticmethod
    @contextlib.contextmanager
    def joined():
        """Join the group (gloo: a few bytes are exchanged, the work is independent); ranks may be hours apart."""
        if ranks.count() > 1:
            torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=30))
        yield
        if ranks.count() > 1:
            torch.distributed.destroy_process_group()

    @staticmethod
    def share(value):
        """Rank 0's value, on every rank; nobody goes on before rank 0 got here."""
        box = [value]
        if ranks.count() > 1:
            torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    @staticmethod
    def total(value):
        """Sum of a number over the ranks; nobody goes on before all got here."""
        number = torch.tensor(float(value), dtype=torch.float64)
        if ranks.count() > 1:
            torch.distributed.all_reduce(number)
        return float(number)


# ---------------------------------------------------------------- seeds, devices, metrics

def seeded(*seeds):
    """Seed torch and return a numpy generator, both from the same tuple of integers."""
    generator = np.random.default_rng(seeds)
    torch.manual_seed(int(generator.integers(2**31)))
    return generator


def pick_device(name):
    """torch.device for auto | cpu | cuda. Raises UserError when cuda is asked for and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device is visible to PyTorch", "--device cuda", "use --device cpu or install a CUDA build of torch")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def auc(labels, scores):
    return float(roc_auc_score(labels, scores))


def logloss(labels, probabilities):
    return float(log_loss(labels, np.asarray(probabilities, dtype=np.float64), labels=[0, 1]))


def mean_sd(values):
    """(mean, sample standard deviation); the sd of a single value is 0."""
    values = np.asarray(values, dtype=np.float64)
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0


def peak_memory_mb():
    """Largest resident memory of this process so far, in MB (Linux; 0 where it cannot be read)."""
    with contextlib.suppress(OSError, IndexError):
        status = Path("/proc/self/status").read_text()
        return round(int(status.split("VmHWM:")[1].split()[0]) / 1024)
    return 0


# ---------------------------------------------------------------- the frozen LLM

def load_language_model(name, dtype, device):
    """(model, tokenizer) of a hub name or local folder through transformers' Auto classes, frozen and in eval mode.

    dtype: torch dtype. Raises UserError in plain words for the usual failures: no network, gated repository, no disk space.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging
    logging.set_verbosity_error()
    logging.disable_progress_bar() if Path(name).is_dir() else logging.enable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, attn_implementation=attention_for(dtype, device))
    except Exception as error:
        raise _explain_load_failure(name, error) from error
    return freeze(fuse_activations(model).to(device)), tokenizer


def attention_for(dtype, device):
    """Which of transformers' attention implementations is fastest. Both take the additive mask as it is.

    Note: in bf16 on a CPU the fused kernel's backward pass is slow; spelled out, a step at the GPT-2 shape is a fifth faster.
    """
    return "eager" if dtype == torch.bfloat16 and torch.device(device).type == "cpu" else "sdpa"


def _explain_load_failure(name, error):
    """UserError for an exception of from_pretrained."""
    chain, cause = [], error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    text = " ".join(f"{type(link).__name__} {link}" for link in chain)
    if any(isinstance(link, OSError) and link.errno == errno.ENOSPC for link in chain):
        return UserError("no disk space is left for the model", name, "free space or point HF_HOME at a larger disk")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return UserError("the model does not fit in memory", name, "use --dtype fp16 or a smaller --lm, such as gpt2 or tiny")
    if "GatedRepo" in text or "gated repo" in text or "401" in text or "403" in text:
        return UserError("the model is gated or private", name, "accept its licence on its page, run `hf auth login`, or take --lm gpt2")
    if Path(name).exists():
        return UserError(f"the folder holds no causal language model transformers can load: {str(error)[:160]}", name,
                         "give a folder written by save_pretrained (model and tokenizer)")
    if "RepositoryNotFound" in text or "404" in text:
        return UserError("there is no such model", name, "check the name, or give a local folder")
    return UserError("the model is neither a local folder nor could it be downloaded", name,
                     "check the name and the network, put a copy of the model in a folder and give its path, or take --lm tiny")


def fuse_activations(model):
    """Put PyTorch's fused tanh-GELU in the place of transformers' gelu_new, the same function spelled out in seven kernels."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child).__name__ == "NewGELUActivation":
                setattr(module, name, nn.GELU(approximate="tanh"))
    return model


def freeze(model):
    """Switch gradients and dropout off; theta will be the only trainable tensor."""
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def parameter_counts(model):
    """(trainable, frozen) numbers of parameters."""
    counts = [0, 0]
    for parameter in model.parameters():
        counts[0 if parameter.requires_grad else 1] += parameter.numel()
    return tuple(counts)


# ---------------------------------------------------------------- fields and the DCN recommender

@dataclass
class Field:
    """One feature field of a CTR model: `size` ids in `width` columns (several for a many-valued field, padded with id = size).

    vectors: optional float (size, d); then an id stands for its row, brought to the embedding width by a learned projection.
    """

    name: str
    size: int
    width: int = 1
    vectors: torch.Tensor | None = None


class FieldEmbedding(nn.Module):
    """Embeds (B, columns) ids of all fields to (B, F, D); a many-valued field is the mean of its values.

    Note: rows start at N(0, .05^2). With torch's default N(0, 1) a DCN overfits at once; with a tenth of it, it does not leave
    the saddle at zero on small data, where products of embeddings have no gradient.
    """

    def __init__(self, fields, dim, std=0.05):
        super().__init__()
        self.fields, self.dim = fields, dim
        self.columns = sum(field.width for field in fields)
        # One extra row a field, for padding and unseen ids.
        starts = np.cumsum([0] + [field.size + 1 if field.vectors is None else 0 for field in fields])
        widths = [field.width for field in fields]
        self.register_buffer("offsets", torch.tensor(np.repeat(starts[:-1], widths)), persistent=False)
        self.register_buffer("from_vectors", torch.tensor(np.repeat([field.vectors is not None for field in fields], widths)), persistent=False)
        self.table = nn.Embedding(int(starts[-1]), dim)
        nn.init.normal_(self.table.weight, std=std)
        with torch.no_grad():  # the extra row stays 0: a padded value says nothing, an unseen id neither
            self.table.weight[[start + field.size for start, field in zip(starts, fields) if field.vectors is None]] = 0
        self.simple = all(field.width == 1 and field.vectors is None for field in fields)
        self.projections = nn.ModuleDict({field.name: nn.Linear(field.vectors.shape[1], dim) for field in fields
                                          if field.vectors is not None})
        for field in fields:
            if field.vectors is not None:
                self.register_buffer(f"vectors_{field.name}", field.vectors, persistent=False)

    def forward(self, ids):
        if self.simple:
            return self.table(ids + self.offsets)  # Shape: (B, columns, D)
        embedded = self.table((ids + self.offsets).masked_fill(self.from_vectors, 0))
        parts, column = [], 0
        for field in self.fields:
            if field.vectors is not None:
                part = self.projections[field.name](getattr(self, f"vectors_{field.name}")[ids[:, column]])
            else:
                present = (ids[:, column:column + field.width] < field.size).to(embedded.dtype).unsqueeze(-1)
                part = (embedded[:, column:column + field.width] * present).sum(1) / present.sum(1).clamp(min=1)
            parts.append(part)
            column += field.width
        return torch.stack(parts, dim=1)  # Shape: (B, F, D)


class CrossNetwork(nn.Module):
    """x_{l+1} = x_0 (x_l . w_l) + b_l + x_l, the cross layer of Wang et al. 2017, Eq. (3). (B, n) -> (B, n).

    Every x_l is a_l x_0 + c_l, with a number a_l for each row and c_l = b_0 + ... + b_{l-1}: put it in, and a_{l+1} = a_l + a_l (x_0 . w_l)
    + c_l . w_l. So one matrix product and a few numbers a row do what L passes over (B, n) would.
    """

    def __init__(self, width, layers):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(layers, width) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(layers, width))

    def forward(self, x0):
        c = self.bias.cumsum(0)  # row l: c_{l+1}
        constants = F.pad((c[:-1] * self.weight[1:]).sum(1), (1, 0))  # c_l . w_l, with c_0 = 0. Shape: (L,)
        a = torch.ones_like(x0[:, :1])
        for product, constant in zip((x0 @ self.weight.T).split(1, dim=1), constants):  # x_0 . w_l of each row, Shape: (B, 1)
            a = torch.addcmul(a + constant, a, product)
        return torch.addcmul(c[-1], a, x0)


def linear(width, size):
    """Linear layer with Xavier weights and bias 0: small inputs then meet the kink of ReLU, where feature interactions begin."""
    layer = nn.Linear(width, size)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(width, hidden, dropout):
    """Linear + ReLU + dropout, once for each hidden width."""
    layers = []
    for size in hidden:
        layers += [linear(width, size), nn.ReLU(), nn.Dropout(dropout)]
        width = size
    return nn.Sequential(*layers)


class DCN(nn.Module):
    """Deep & Cross Network (Wang et al. 2017) with the paper's section 3.4 settings: 3 cross layers, D = 8, MLP 16-16, dropout .2.

    forward: ids (B, columns) -> logits (B,). logit: field embeddings (B, F, D) -> logits (B,), for stage 03, which appends
    `extra_fields` embeddings of its own.
    """

    def __init__(self, fields, dim=8, layers=3, hidden=(16, 16), dropout=0.2, extra_fields=0):
        super().__init__()
        self.embed = FieldEmbedding(fields, dim)
        width = (len(fields) + extra_fields) * dim
        self.cross = CrossNetwork(width, layers)
        self.deep = mlp(width, hidden, dropout)
        self.head = linear(width + hidden[-1], 1)

    def logit(self, embedded):
        x0 = embedded.flatten(1)  # Shape: (B, F * D)
        return self.head(torch.cat([self.cross(x0), self.deep(x0)], dim=1)).squeeze(1)

    def forward(self, ids):
        return self.logit(self.embed(ids))

