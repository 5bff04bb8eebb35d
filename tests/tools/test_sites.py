"""Site files: fields of a cluster, read as strictly as configs are."""

import pytest

from slurm.errors import LaunchError
from tools.command_line import cluster_options


def test_the_example_of_a_site_is_a_good_one():
    options = cluster_options("example", ["setup=module load cuda", "time=60"])
    assert options.partition == "gpu" and options.time == 60
    assert options.setup == ["export NCCL_DEBUG=WARN", "module load cuda"]


@pytest.mark.parametrize(
    ("content", "settings", "message"),
    [
        ("time: [", [], "not YAML: line 1"),
        ("partition: a\ntime: 5\npartition: b\n", [], "partition: given twice, in lines 1 and 3"),
        ("time: 1:30", [], "--slurm time=1:30: Input should be a valid integer"),
        ("time: on", [], "time=on: line 1 may be misread; write true"),
        ("setup:\n\t- x", [], "line 2: a tab; indent with spaces"),
        ("- gpu", [], "holds a list; it must hold fields"),
        ("setup: x", ["setup=y"], "--slurm setup=x: Input should be a valid list"),
        ("setup:", ["setup=y"], ""),
        ("time: 2", ["signal_delay=120"], "signal_delay=120: seconds, but time=2 is minutes"),
        ("time: 2", ["signal_delay=119"], ""),
    ],
)
def test_a_bad_site_is_one_line(tmp_path, content, settings, message):
    (tmp_path / "site.yaml").write_text(content)
    if not message:
        cluster_options(str(tmp_path / "site.yaml"), settings)
        return
    with pytest.raises(LaunchError) as error:
        cluster_options(str(tmp_path / "site.yaml"), settings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_names_of_a_site_stay_as_they_are_written(tmp_path):
    site = tmp_path / "site.yaml"
    site.write_bytes(b"\xef\xbb\xbfpartition: 042\r\nqos: no\r\nexclude: 1e3\r\ntime: 010\r\nsetup: [007]\r\n")
    options = cluster_options(str(site), [])
    assert (options.partition, options.qos, options.exclude) == ("042", "no", "1e3")
    assert (options.time, options.setup) == (10, ["007"])
