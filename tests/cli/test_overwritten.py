"""Values that a later configuration file takes the place of are told."""

from lit_specrl.cli.configuration_files import COMMAND_LINE, Source, overwritten

MINE = Source("mine.yaml", {"model": {"init_args": {"beta": 0.1}}, "data": {"batch_size": 32, "seed": 3}})
BLOCK = Source("block.yaml", {"data": {"init_args": {"batch_size": 8, "seed": 3, "shuffle": False}}})
OPTION = Source(COMMAND_LINE, {"data": {"init_args": {"batch_size": 16}}})
SAID = "data.batch_size: 8 of block.yaml takes the place of "


def test_a_value_of_an_earlier_file_is_told_and_an_equal_one_is_not():
    assert overwritten([MINE, BLOCK]) == [SAID + "32 of mine.yaml"]


def test_an_option_is_told_where_a_file_takes_its_place_alone():
    assert overwritten([MINE, OPTION]) == []
    assert overwritten([MINE, BLOCK, OPTION]) == []
    assert overwritten([MINE, OPTION, BLOCK]) == [SAID + "16 of the command line"]


def test_callbacks_add_up():
    files = [Source(f"{name}.yaml", {"trainer": {"callbacks": [name]}}) for name in ("PrefixCache", "RunSummary")]
    added = Source("added.yaml", {"trainer": {"callbacks+": "RolloutRecorder"}})
    assert overwritten([*files, added]) == []


def test_a_class_in_place_of_a_plain_value_is_told():
    files = [
        Source("mine.yaml", {"trainer": {"logger": False}}),
        Source("block.yaml", {"trainer": {"logger": {"class_path": "CSVLogger", "init_args": {"name": "run"}}}}),
    ]
    assert overwritten(files) == [
        "trainer.logger.class_path: CSVLogger of block.yaml takes the place of false of mine.yaml"
    ]
