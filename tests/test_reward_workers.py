"""Rewards in processes of their own: what comes back, and what happens when one dies, hangs or talks nonsense."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from stepfuse.rewards.registry import load_reward
from stepfuse.rewards.worker import environment
from stepfuse.rewards.worker.client import WorkerReward, WorkerSettings
from stepfuse.rewards.worker.messages import MessageError, decode, encode
from tests.fixtures_tiny import refused

IMAGES = torch.rand(7, 3, 5, 6, generator=torch.Generator().manual_seed(0))
PROMPTS = [f"number {i}" for i in range(7)]
# Tells every image and every prompt apart: the sum of its bytes, and the prompt's number.
TELLING = "    return [float(image.sum()) * 100 + int(p.split()[1]) for image, p in zip(images, prompts)]\n"
EXPECTED = ((IMAGES * 255).round().sum((1, 2, 3)) * 100 + torch.arange(7)).double()


@pytest.fixture
def worker(tmp_path, monkeypatch):
    """Make a worker whose function is this code; what it writes goes into the test's folder."""
    monkeypatch.chdir(tmp_path)
    made = []

    def make(body, **settings):
        (tmp_path / "mine.py").write_text("import os, sys, time\nimport numpy as np\n" + textwrap.dedent(body))
        values = dict(function="mine.py:reward", batch_size=3, timeout=60.0) | settings
        made.append(WorkerReward(WorkerSettings(**values), name="mine", folder=tmp_path))
        return made[-1]

    yield make
    for one in made:
        one.close()


def telling(first="    pass\n"):
    """A reward that does something first, and then tells images and prompts apart."""
    return f"def reward(images, prompts):\n{first}{TELLING}"


# What comes back.


def test_scores_come_back_in_order_batch_by_batch(worker):
    found = worker(telling("    print(len(images), images.dtype, images.shape)\n"))(IMAGES, PROMPTS)
    assert found.tolist() == EXPECTED.float().tolist()
    assert found.dtype == torch.float32


def test_a_class_is_made_once_with_its_arguments(worker):
    reward = worker(
        """
        class reward:
            def __init__(self, offset):
                self.calls = offset
            def __call__(self, images, prompts):
                self.calls += 1
                return [self.calls] * len(images)
        """,
        arguments={"offset": 40},
    )
    assert reward(IMAGES, PROMPTS).tolist() == [41, 41, 41, 42, 42, 42, 43]


def test_a_worker_is_one_process_without_this_ones_modules(worker):
    reward = worker("def reward(images, prompts):\n    return [os.getpid(), 'torch' in sys.modules, 0]\n")
    first, second = reward(IMAGES[:3], PROMPTS[:3]), reward(IMAGES[:3], PROMPTS[:3])
    assert first[0] == second[0] != os.getpid()
    assert first[1] == 0
    reward.close()
    assert reward(IMAGES[:3], PROMPTS[:3])[0] != first[0]


@pytest.mark.parametrize("prompt", ["", "夜空の花火", "long " * 2000, 'quotes " and \\ and \n lines', "\u0000"])
def test_any_prompt_arrives_as_it_is(prompt, worker):
    # Its bytes as digits in base 257, modulo a prime that a float32 holds, and its length.
    code = "sum(b * pow(257, i, 999983) for i, b in enumerate(p.encode())) % 999983 + len(p)"
    found = worker(f"def reward(images, prompts):\n    return [{code} for p in prompts]\n")(IMAGES[:1], [prompt]).item()
    number = 0
    for byte in reversed(prompt.encode()):
        number = (number * 257 + byte) % 999983
    assert found == number + len(prompt)


# Faults. A batch of three is asked at a time: the second is where it goes wrong.

ONCE = "    if 'number 4' in prompts and not os.path.exists('done'):\n        open('done', 'w').close()\n        "
ALWAYS = "    if 'number 4' in prompts:\n        "
SOCKET = "os.write(int(sys.argv[1]), b'what is this?' * 9)"
FAULTS = {
    "killed": ("print('out of memory', flush=True); os.kill(os.getpid(), 9)", "SIGKILL", "out of memory"),
    "ends": ("print('bye', flush=True); os._exit(3)", "exit status 3", "bye"),
    "hangs": ("print('thinking', flush=True); time.sleep(600)", "did not answer within 2 s", "thinking"),
    "garbage": (f"print('hm', flush=True); {SOCKET}; time.sleep(600)", "invalid response", "hm"),
    "segfault": ("import ctypes; ctypes.string_at(0)", "SIGSEGV", "nothing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_worker_that_fails_once_is_started_again_and_no_score_is_lost_or_moved(fault, worker):
    reward = worker(telling(ONCE + FAULTS[fault][0] + "\n"), timeout=2.0)
    assert reward(IMAGES, PROMPTS).tolist() == EXPECTED.float().tolist()
    assert Path("done").exists()  # it did happen


@pytest.mark.parametrize("fault", FAULTS)
def test_a_worker_that_fails_twice_is_an_error_with_its_last_output(fault, worker):
    code, how, output = FAULTS[fault]
    reward = worker(telling(ALWAYS + code + "\n"), timeout=2.0)
    with refused("'mine'", how, output, "images 3 to 5", "twice"):
        reward(IMAGES, PROMPTS)
    # The next batch gets a fresh one.
    assert reward(IMAGES[:2], PROMPTS[:2]).tolist() == EXPECTED[:2].float().tolist()


@pytest.mark.parametrize("text", ["b'SFR1' + b'\\xff' * 4", "b'SFR1\\x02\\x00\\x00\\x00{}'", "b'\\x00' * 8"])
def test_bytes_that_are_no_message_are_garbage_whatever_they_are(text, worker):
    with refused("'mine'", "invalid response"):
        worker(telling(ALWAYS + f"os.write(int(sys.argv[1]), {text}); time.sleep(600)\n"), timeout=2.0)(IMAGES, PROMPTS)


def test_printing_is_not_talking(worker):
    """Standard output is a log: whatever a package prints, scores are unharmed."""
    noise = "    os.write(1, b'SFR1' * 99999); sys.stderr.write('x' * 99999)\n"
    assert worker(telling(noise))(IMAGES, PROMPTS).tolist() == EXPECTED.float().tolist()


@pytest.mark.parametrize(
    ("code", "culprit"),
    [
        ("    raise RuntimeError('no such colour')\n", "no such colour"),
        ("    return [1.0]\n", "(1,)"),
        ("    return None\n", "reward"),
        ("    return [float('nan')] * len(images)\n", "nan"),
        ("    return ['a'] * len(images)\n", "could not convert"),
    ],
)
def test_a_reward_that_raises_or_returns_nonsense_is_not_started_again(code, culprit, worker):
    from stepfuse.rewards.protocol import score

    counting = "    open('calls', 'a').write('x')\n"
    with refused("'mine'", culprit):
        score(worker("def reward(images, prompts):\n" + counting + code), IMAGES[:3], PROMPTS[:3], name="mine")
    assert Path("calls").read_text() == "x"


@pytest.mark.parametrize(
    ("body", "function", "culprit"),
    [
        ("import no_such_module", "mine.py:reward", "no_such_module"),
        ("x = 1", "mine.py:reward", "reward"),
        ("def reward(", "mine.py:reward", "SyntaxError"),
        ("print('before the end'); os._exit(7)", "mine.py:reward", "exit status 7"),
        ("x = 1", "no.such.module:reward", "no"),
        ("def reward(images, prompts):\n    sys.exit('no model here')", "mine.py:reward", "no model here"),
    ],
)
def test_a_worker_that_cannot_start_says_why_at_once(body, function, culprit, worker):
    with refused("'mine'", culprit):
        worker(body, function=function)(IMAGES, PROMPTS)


def test_arguments_are_for_classes(worker):
    with refused("'mine'", "arguments"):
        worker("def reward(images, prompts):\n    return [0.0]\n", arguments={"a": 1})(IMAGES[:1], PROMPTS[:1])


def test_large_images_go_in_smaller_batches(monkeypatch, worker):
    monkeypatch.setattr("stepfuse.rewards.worker.messages.MAX_BATCH_BYTES", 2 * 5 * 6 * 3)
    reward = worker("def reward(images, prompts):\n    return [len(images)] * len(images)\n", batch_size=5)
    assert reward(IMAGES, PROMPTS).tolist() == [2, 2, 2, 2, 2, 2, 1]


@pytest.mark.parametrize("function", ["mine.py", ":reward", "mine.py:", "other.py:reward"])
def test_a_function_that_is_not_there_is_named_before_anything_runs(function, worker):
    with refused("'mine'"):
        worker("x = 1", function=function)


# Its end.


def gone(pid, seconds=15):
    """Whether a process ends within some seconds; a zombie has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "in the middle of a batch"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, None], ids=["kill -9", "kill", "its own end"])
def test_a_worker_and_what_it_started_die_with_their_parent(how, busy, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os, subprocess, sys, time\n"
        "def reward(images, prompts):\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "    print(os.getpid(), child.pid, file=open('pids', 'w'), flush=True)\n"
        # Busy in C with the interpreter held: no thread of Python's runs beside it.
        f"    {'pow(3, 10**9)' if busy else 'pass'}\n"
        "    return [0.0]\n"
    )
    wait = "import time; time.sleep(600)" if how else "pass"
    call = "r(torch.zeros(1, 3, 4, 4), [''])"
    if busy:
        call = "threading.Thread(target=r, args=(torch.zeros(1, 3, 4, 4), ['']), daemon=True).start()"
    parent = (
        "import threading, torch; from pathlib import Path\n"
        "from stepfuse.rewards.worker.client import WorkerReward, WorkerSettings\n"
        "r = WorkerReward(WorkerSettings(function='mine.py:reward'), name='mine', folder=Path('.'))\n"
        f"{call}\n"
        "while not Path('pids').exists() or len(Path('pids').read_text().split()) < 2:\n    pass\n"
        f"{wait}\n"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=tmp_path)
    pids = []
    end = time.monotonic() + 120
    while len(pids) < 2 and time.monotonic() < end:
        time.sleep(0.05)
        if (tmp_path / "pids").exists():
            pids = [int(part) for part in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    if how is not None:
        process.send_signal(how)
    process.wait(60)
    assert [gone(pid) for pid in pids] == [True, True]


# Messages.


def test_a_message_is_read_back_as_it_was_written():
    arrays = [np.arange(24, dtype=np.uint8).reshape(2, 3, 4), np.zeros((0, 5)), np.float64([1.5, -np.inf])]
    header, found = decode(encode({"kind": "score", "prompts": ["é", ""]}, arrays))
    assert header == {"kind": "score", "prompts": ["é", ""]}
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(arrays, found, strict=True))


def test_no_bytes_are_read_as_a_message_that_are_none():
    generator = np.random.default_rng(0)
    whole = encode({"kind": "scores", "id": 3}, [np.arange(5.0)])
    for _ in range(3000):
        data = bytearray(whole)
        for place in generator.integers(0, len(data), 3):
            data[place] = generator.integers(0, 256)
        cut = bytes(data[: generator.integers(0, len(data) + 1)]) if generator.random() < 0.3 else bytes(data)
        try:
            header, arrays = decode(cut)
        except MessageError:
            continue
        assert isinstance(header, dict)
        assert sum(a.nbytes for a in arrays) <= len(cut)


def test_a_header_that_claims_too_much_is_refused_before_memory_is_taken():
    for shape in ([10**12], [2**40, 2**40], [-1], [1.5], "x"):
        head = f'{{"arrays": [{{"type": "float64", "shape": {shape!r}}}]}}'.replace("'", '"').encode()
        with pytest.raises(MessageError):
            decode(b"SFR1" + len(head).to_bytes(4, "little") + head)


# Environments.


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPFUSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def index_is_there():
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "six==0"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=300).stderr
    return "from versions: 0" in said  # 0.9.0 is the first there is


@pytest.mark.slow
def test_an_environment_is_made_once_from_its_requirements_and_kept(cache, tmp_path, capfd):
    if not index_is_there():
        pytest.skip("needs a package index")
    (tmp_path / "wanted.txt").write_text("numpy==2.3.5\nsix==1.16.0\n")
    (tmp_path / "mine.py").write_text(
        "import numpy, six\nclass Version:\n    def __call__(self, images, prompts):\n"
        "        return [float(numpy.__version__.split('.')[1]) + len(p) for p in prompts]\n"
    )
    (tmp_path / "mine.yaml").write_text("worker:\n  requirements: wanted.txt\n  function: mine.py:Version\n")
    assert np.__version__ != "2.3.5"
    for _ in range(2):
        reward = load_reward(str(tmp_path / "mine.yaml"))
        assert reward(IMAGES, PROMPTS).tolist() == [3.0 + 8] * 7
        reward.close()
    assert capfd.readouterr().err.count("creating the environment") == 1
    (folder,) = [path for path in (cache / "environments").iterdir() if path.is_dir()]
    # An incomplete environment is created again.
    (folder / environment.COMPLETE).unlink()
    (folder / "bin" / "python").unlink()
    reward = load_reward(str(tmp_path / "mine.yaml"))
    assert reward(IMAGES[:1], PROMPTS[:1]).tolist() == [11.0]
    reward.close()


@pytest.mark.parametrize(
    ("requirement", "python", "culprit"),
    [
        ("./no/such/folder", None, "no/such/folder"),
        ("numpy ===== 3", None, "numpy"),
        ("numpy", "python9.9", "python9.9"),
    ],
)
def test_an_environment_that_cannot_be_made_says_why_and_leaves_nothing(requirement, python, culprit, cache, tmp_path):
    (tmp_path / "wanted.txt").write_text(requirement)
    with refused("wanted.txt", culprit, ".log"):
        environment.environment_python(tmp_path / "wanted.txt", python)
    assert [path for path in (cache / "environments").iterdir() if path.is_dir()] == []


def test_a_requirements_file_that_is_not_there_is_named(cache, tmp_path):
    with refused("wanted.txt"):
        WorkerReward(WorkerSettings(function="mine.py:reward", requirements="wanted.txt"), name="mine", folder=tmp_path)
