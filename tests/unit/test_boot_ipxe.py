"""The scripts for iPXE."""

from nodepool.boot import ipxe
from nodepool.door import Expected

URL = "http://198.51.100.1:8090"
MAC = "52:54:00:00:00:01"
TOKEN = "0123456789abcdef" * 2


def agent_script(console="ttyS0"):
    return ipxe.render(Expected("r1n1", TOKEN, console), URL, MAC)


def kernel_words(script):
    line = next(line for line in script.splitlines() if line.startswith("kernel "))
    return line.removesuffix(" || goto again").split()[2:]


def test_an_expected_machine_loads_the_agent_with_its_token():
    script = agent_script()
    assert script.startswith("#!ipxe\n")
    assert f"kernel {URL}/files/agent/vmlinuz " in script
    assert f"initrd {URL}/files/agent/initrd.img " in script
    words = kernel_words(script)
    assert [f"nodepool.url={URL}", f"nodepool.token={TOKEN}", f"nodepool.mac={MAC}"] == words[1:4]


def test_the_letters_that_the_efi_stub_looks_for_stand_in_one_word_only():
    assert [word for word in kernel_words(agent_script()) if "initrd=" in word] == ["initrd=initrd.img"]


def test_the_agents_console_is_the_last_one_and_fast():
    assert [word for word in kernel_words(agent_script("ttyS1")) if "console" in word][-1] == "console=ttyS1,115200"
    assert "console=ttyS1,57600" in kernel_words(agent_script("ttyS1,57600"))


def test_a_machine_that_is_not_expected_goes_on_to_its_disk_and_learns_no_token():
    script = ipxe.render(None, URL, MAC)
    assert "sanboot --no-describe --drive 0x80" in script
    assert "kernel" not in script
    assert "token" not in script


def test_uefi_is_told_that_this_boot_option_failed_so_that_it_tries_the_next():
    last = ipxe.render(None, URL, MAC).splitlines()[-1]
    assert last == "exit 1"


def test_the_first_script_asks_for_the_card_that_was_booted_and_replaces_itself():
    script = ipxe.first(URL)
    assert f"chain --replace {URL}/boot/${{netX/mac}} ||" in script.splitlines()


def test_the_first_script_asks_again_but_not_for_ever():
    lines = ipxe.first(URL).splitlines()
    assert "goto ask" in lines
    assert f"iseq ${{tries}} {ipxe.ASK_TIMES} && goto disk ||" in lines
    assert lines.index(":disk") > lines.index("goto ask")
