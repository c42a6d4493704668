"""A judge behind a real HTTP server that answers, delays, fails, and talks nonsense."""

import copy
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tiny_models import SHAPE, build_tokenizer
from training import BATCH_SIZE, GROUP, QUESTIONS, History, arithmetic, grpo, make_trainer
from transformers import LlamaConfig, LlamaForSequenceClassification

from lit_specrl.rewards import JudgeReward, RewardFunction, RewardModel, RewardSet


class Judge(BaseHTTPRequestHandler):
    """Does what the response that it is asked about says."""

    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        wish = body["messages"][-1]["content"].partition("Response: ")[2]
        with server.lock:
            server.requests.append((self.path, dict(self.headers), body))
            server.attempts[wish] += 1
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
        status, text = self.answer(wish)
        with server.lock:
            server.in_flight -= 1
        reply = json.dumps({"choices": [{"message": {"content": text}}]}) if status == 200 else text
        try:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(reply.encode())
        except OSError:  # the client has left
            pass

    def answer(self, wish):
        kind, _, rest = wish.partition(" ")
        if kind == "wait":
            time.sleep(float(rest))
        if kind == "busy" and self.server.attempts[wish] <= int(rest):
            return 503, "busy"
        if kind == "refuse":
            return 401, f"no such key: {self.headers.get('Authorization')}"
        if kind == "too":
            return 400, "the prompt is too long"
        return 200, {"garbage": "well", "json": 'Thus {"why": "{", "score": 4}'}.get(kind, "So 3 of 4. Score: 7.5")

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    server.daemon_threads = True
    server.lock, server.requests, server.attempts = threading.Lock(), [], Counter()
    server.in_flight = server.most_in_flight = 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def judge(server):
    made = []

    def make(**options):
        defaults = {"prompt": "Q: {question} A: {answer} Response: {completion}", "backoff_s": 0.01, "timeout_s": 5.0}
        made.append(JudgeReward("judge", f"http://127.0.0.1:{server.server_port}/v1", **defaults | options))
        return made[-1]

    yield make
    for reward in made:
        reward.close()


def ask(reward, completions, answers=None):
    rewards, size = RewardSet([reward]), len(completions)
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "2 + {answer}?"}]
    scores = rewards(["p"] * size, completions, answer=answers or ["5"] * size, prompt_messages=[turns] * size)
    counters = {name.removeprefix("rewards/judge/"): count for name, count in scores.metrics.items()}
    return scores.values[0], {name: count for name, count in counters.items() if count}


def test_every_row_gets_its_score_whatever_happens_to_others(judge, server):
    reward = judge(timeout_s=0.5, max_retries=2, options={"max_tokens": 99})
    with pytest.warns(UserWarning, match="reward 'judge': 4 of 7 rows were not judged and count as None"):
        values, counters = ask(reward, ["good", "busy 2", "garbage", "busy 9", "too long", "wait 2", "{question}"])
    assert values == [0.75, 0.75, None, None, None, None, 0.75]
    assert counters == {"failures": 3, "unparsed": 1, "retries": 2}
    assert [server.attempts[wish] for wish in ("good", "busy 2", "busy 9", "too long", "wait 2")] == [1, 3, 3, 1, 3]
    path, _, body = server.requests[0]
    assert path == "/v1/chat/completions" and (body["model"], body["max_tokens"]) == ("judge", 99)
    asked = {request["messages"][0]["content"] for _, _, request in server.requests}
    assert "Q: 2 + {answer}? A: 5 Response: {question}" in asked  # what stands in a text is filled with nothing
    copy.deepcopy(reward)


def test_no_more_requests_are_in_flight_than_allowed_and_the_deadline_holds(judge, server):
    reward = judge(max_concurrency=2, deadline_s=1.0, max_retries=0)
    started_at = time.monotonic()
    with pytest.warns(UserWarning, match="6 of 8 rows were not judged"):
        values, counters = ask(reward, ["good", "fine", *(f"wait 5.{n}" for n in range(6))])
    assert time.monotonic() - started_at < 10  # 15 without it, and more where the machine is slow
    assert server.most_in_flight == 2
    assert values == [0.75, 0.75, *[None] * 6] and counters == {"failures": 6}


def test_scores_come_from_json_too_and_lie_in_the_range(judge):
    reward = judge(score_key="score", lowest=0, highest=5)
    assert ask(reward, ["json"], [None])[0] == [0.8]
    assert reward.read('{"score": 6}') is reward.read('{"score": "x"}') is reward.read("none") is None
    plain = judge()
    assert [plain.read(text) for text in ("score 2, no: **Score:** 10", "Score: 11", "Score: -1")] == [1.0, None, None]


def test_a_server_that_refuses_everything_ends_the_run_and_the_key_is_shown_nowhere(judge, server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    reward = judge(api_key_env="JUDGE_KEY")
    with pytest.raises(RuntimeError, match=r"answers 401 .*no such key: Bearer \*\*\*; check base_url") as found:
        ask(reward, ["refuse"])
    assert server.requests[0][1]["Authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in repr((str(found.value), vars(reward), vars(reward._client), reward.identity()))


def test_calls_without_any_score_end_the_run(judge):
    reward = judge()
    for _ in range(2):
        with pytest.warns(UserWarning, match="no score between 0 and 10 in 'well'"):
            ask(reward, ["garbage"])
    with pytest.raises(RuntimeError, match="3 calls in a row gave no scores, the last one by no score between"):
        ask(reward, ["garbage"])


def test_a_run_is_rewarded_by_a_model_a_judge_and_a_function_of_conversations(
    judge, monkeypatch, tmp_path, tiny_model, data_file
):
    """Two steps; the key stands in no checkpoint and in no setting."""
    monkeypatch.setenv("JUDGE_KEY", "sk-secret")
    LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=1)).save_pretrained(tmp_path / "classifier")
    build_tokenizer().save_pretrained(tmp_path / "classifier")
    seen = []

    def polite(prompts, completions, **columns):
        seen.extend(zip(prompts, completions, strict=True))
        return [float(len(completion[0]["content"])) for completion in completions]

    rewards = [
        RewardModel(str(tmp_path / "classifier"), name="classifier"),
        judge(api_key_env="JUDGE_KEY"),
        RewardFunction(polite, conversational=True),
    ]
    module, history = grpo(tiny_model, rewards), History()
    trainer = make_trainer(history, default_root_dir=tmp_path, max_steps=2)
    trainer.fit(module, datamodule=arithmetic(train=data_file))
    assert [metrics["rewards/judge/mean"] for metrics in history.steps.values()] == [0.75, 0.75]
    assert all(metrics["rewards/classifier/std"] > 0 for metrics in history.steps.values())
    assert len(seen) == 2 * BATCH_SIZE * GROUP
    assert all(prompt == [{"role": "user", "content": prompt[0]["content"]}] for prompt, _ in seen)
    assert {prompt[0]["content"] for prompt, _ in seen} == set(QUESTIONS)
    assert all([turn["role"] for turn in completion] == ["assistant"] for _, completion in seen)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    assert b"sk-secret" not in (tmp_path / "end.ckpt").read_bytes() and "sk-secret" not in repr(module.settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "localhost"}, "base_url must be an address such as"),
        ({"base_url": "http://me:pw@host/v1"}, "base_url must hold no user and no password"),
        ({"prompt": "How good?"}, r"prompt must contain \{completion\}"),
        ({"score": "x"}, "score must be a regular expression with one group, got 'x'"),
        ({"score": "("}, r"score must be a regular expression with one group, got '\('"),
        ({"lowest": 3.0, "highest": 3.0}, "lowest must be less than highest, got 3.0 and 3.0"),
        ({"timeout_s": 0.0}, "timeout_s must be a positive number of seconds, got 0.0"),
        ({"max_concurrency": 0}, "expected max_concurrency >= 1"),
        ({"api_key_env": "NOT_SET_ANYWHERE"}, "names the environment variable 'NOT_SET_ANYWHERE', which is not set"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        JudgeReward(**{"model": "judge", "base_url": "http://localhost/v1", **options})
