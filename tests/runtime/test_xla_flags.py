import os

from madformer_jax.runtime import xla_flags


def test_only_flags_that_every_library_knows_are_known(tmp_path, monkeypatch):
    contents = {"one": b"x\0xla_old\0\0xla_new\0", "two": b"\0xla_new\0R\x07xla_oldR\0set_xla_old\0"}
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / "lib.so").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(xla_flags, "LIBRARIES", {"one": "*.so", "two": "*.so", "absent_library": "*.so"})
    flags = "--xla_old=1 --xla_new --xla_other="
    assert xla_flags.supported(flags, ["one", "two", "absent_library"]) == "--xla_new"
    assert xla_flags.supported(flags, ["one"]) == "--xla_old=1 --xla_new"
    assert xla_flags.supported(flags, ["absent_library"]) == ""


def test_the_installed_libraries_know_their_flags():
    flags = "--xla_force_host_platform_device_count=8 --xla_flag_of_another_year=1"
    assert xla_flags.supported(flags) == "--xla_force_host_platform_device_count=8"


def test_xla_is_given_its_flag_on_a_cpu_that_knows_it_only(monkeypatch):
    flag = f"--{xla_flags.YNN_FLAG}="

    def given(platform, flags="", platforms="", accelerator=False):
        monkeypatch.setenv("XLA_FLAGS", flags)
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
        monkeypatch.setattr(xla_flags, "_ACCELERATOR_DEVICES", ("/",) if accelerator else ("/nowhere*",))
        xla_flags.disable_ynnpack(platform)
        return os.environ["XLA_FLAGS"].split()

    assert given("cpu", "--mine") == [flag, "--mine"]
    assert given("") == given("", platforms="cpu", accelerator=True) == [flag]
    assert given("tpu") == given("", platforms="cuda,cpu") == given("", accelerator=True) == []
    assert given("cpu", f"{flag}gemm") == [f"{flag}gemm"]
    monkeypatch.setattr(xla_flags, "YNN_FLAG", "xla_cpu_flag_of_another_year")  # with which XLA would end this process
    assert given("cpu", "--mine") == ["--mine"]
