import random
import re
from itertools import pairwise

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_specrl.bench.command import bench_command
from lit_specrl.bench.toy_policy import NUM_TERMS, Teacher, bench_toy_policy, build_tokenizer, is_right, question
from lit_specrl.data import ArithmeticSource
from lit_specrl.rewards import EquationReward

TERMS = [4, 9, 3, 1, 1, 2, 8, 5, 7]
ANSWER = "04+9=13.13+3=16.16+1=17.17+1=18.18+2=20.20+8=28.28+5=33.33+7=40."


def test_a_teacher_that_never_errs_writes_out_every_sum():
    assert Teacher(0.0, random.Random(0)).answer(TERMS) == ANSWER
    assert is_right(TERMS, ANSWER)
    assert not is_right(TERMS, ANSWER.replace("=40.", "=41."))


def test_the_teacher_errs_by_one_in_hard_sums_and_goes_on_from_there():
    teacher = Teacher(0.5, random.Random(0))
    sums = [re.findall(r"(\d+)\+(\d)=(\d+)", teacher.answer(teacher.terms())) for _ in range(500)]
    errors, tried = {}, {}
    for answer in sums:
        assert all(result == following[0] for (_, _, result), following in pairwise(answer))
        for total, term, result in answer:
            pair = int(total) % 10, int(term)
            tried[pair] = tried.get(pair, 0) + 1
            errors[pair] = errors.get(pair, 0) + abs(int(result) - int(total) - int(term))
    hard = {pair for pair, count in errors.items() if count}
    assert 0.1 < len(hard) / len(tried) < 0.4
    assert sum(errors[pair] for pair in hard) / sum(tried[pair] for pair in hard) == pytest.approx(0.5, abs=0.05)


def test_the_tokenizer_reads_questions_of_the_data_and_gives_answers_that_rewards_read():
    [entry] = ArithmeticSource(1, num_terms=NUM_TERMS).load()
    tokenizer = build_tokenizer()
    ids = tokenizer([entry["question"], question(TERMS), ANSWER])["input_ids"]
    assert tokenizer.unk_token_id not in [token for row in ids for token in row]
    assert [len(row) for row in ids] == [20, 20, 64]
    assert tokenizer.decode(ids[2]) == ANSWER
    assert EquationReward(8)([""], [tokenizer.decode(ids[2])]) == [1.0]


def test_the_policy_is_made_once_and_told_of(tmp_path, capsys):
    folder = tmp_path / "toy"
    bench_command(["toy-policy", f"--folder={folder}", "--steps=2"])
    printed = capsys.readouterr().out
    assert "policy right" in printed and f"--model.init_args.model {folder}" in printed.replace("\n", " ")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(folder)) == 19
    with pytest.raises(ValueError, match="toy is there already; take another, or use the policy that it holds"):
        bench_toy_policy(str(folder), steps=2)


def test_the_same_seed_makes_the_same_policy(tmp_path):
    for name in ("one", "other"):
        bench_toy_policy(str(tmp_path / name), steps=2)
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "other"))
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"steps": 0}, "--steps must be at least 1, got 0"), ({"error_rate": 1.0}, r"--error_rate must lie in \[0, 1\)")],
)
def test_wrong_numbers_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        bench_toy_policy(str(tmp_path / "toy"), **options)
