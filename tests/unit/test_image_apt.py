"""Where an image's packages come from: this machine's own apt configuration, whatever its format."""

from nodepool.image import apt

BOOKWORM = """\
# the base system
deb http://mirror.example/debian bookworm main contrib   # near
deb-src http://mirror.example/debian bookworm main
deb [arch=amd64 signed-by=/keyrings/debian-archive-keyring.gpg] http://mirror.example/debian bookworm-updates main
deb http://security.example/debian-security bookworm-security main
# deb http://gone.example/debian bookworm main
"""

STANZAS = """\
# comment
Types: deb deb-src
URIs: http://mirror.example/debian
  http://other.example/debian
Suites: bookworm bookworm-updates
# a comment within
Components: main
 contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
Enabled: no
URIs: http://off.example/debian
Suites: bookworm
Components: main

Types: deb-src
URIs: http://source.example/debian
Suites: bookworm
Components: main

Types: deb
URIs: http://security.example/debian-security
Suites: bookworm-security
Components: main
Architectures: amd64 arm64
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mQINBGExample
 -----END PGP PUBLIC KEY BLOCK-----
"""


def host(*lines, family="debian", release="bookworm", settings=None):
    return apt.Host(family, release, apt.parse_list("\n".join(lines)), settings or {})


def test_one_line_style_gives_binary_archives_with_their_options():
    sources = apt.parse_list(BOOKWORM)
    assert [(s.uri, s.suite, s.components) for s in sources] == [
        ("http://mirror.example/debian", "bookworm", ("main", "contrib")),
        ("http://mirror.example/debian", "bookworm-updates", ("main",)),
        ("http://security.example/debian-security", "bookworm-security", ("main",)),
    ]
    assert sources[1].options == {"arch": "amd64", "signed-by": "/keyrings/debian-archive-keyring.gpg"}


def test_deb822_style_gives_each_uri_with_each_suite():
    pairs = [(source.uri, source.suite) for source in apt.parse_deb822(STANZAS)]
    assert pairs == [
        ("http://mirror.example/debian", "bookworm"),
        ("http://mirror.example/debian", "bookworm-updates"),
        ("http://other.example/debian", "bookworm"),
        ("http://other.example/debian", "bookworm-updates"),
        ("http://security.example/debian-security", "bookworm-security"),
    ]


def test_deb822_fields_may_go_on_over_lines():
    assert apt.parse_deb822(STANZAS)[0].components == ("main", "contrib")


def test_a_key_written_into_a_stanza_stays_one_option():
    security = apt.parse_deb822(STANZAS)[-1]
    assert "mQINBGExample" in security.options["signed-by"]
    assert security.options["arch"] == "amd64,arm64"


def test_all_files_of_the_folder_are_read_and_others_are_not(tmp_path):
    folder = tmp_path / "sources.list.d"
    folder.mkdir()
    (tmp_path / "sources.list").write_text("deb http://a.example/debian bookworm main\n")
    (folder / "b.list").write_text("deb http://b.example/debian bookworm main\n")
    (folder / "c.sources").write_text("Types: deb\nURIs: http://c.example/debian\nSuites: bookworm\nComponents: main\n")
    (folder / "d.list.save").write_text("deb http://d.example/debian bookworm main\n")
    assert [source.uri[7] for source in apt.read_sources(tmp_path)] == ["a", "b", "c"]


def test_a_machine_without_apt_has_no_sources(tmp_path):
    assert apt.read_sources(tmp_path) == ()


def test_the_mirror_components_and_security_archive_are_this_machines():
    env = apt.environment(apt.Host("debian", "bookworm", apt.parse_list(BOOKWORM)), "debian", "bookworm")
    assert env == {
        "DIB_DISTRIBUTION_MIRROR": "http://mirror.example/debian",
        "DIB_DEBIAN_COMPONENTS": "main,contrib",
        "DIB_DEBIAN_SECURITY_MIRROR": "http://security.example/debian-security",
    }


def test_a_third_partys_archive_of_the_same_suite_is_not_taken_for_the_distribution():
    here = host("deb http://tools.example/apt bookworm main", "deb http://mirror.example/debian/ bookworm main")
    assert apt.environment(here, "debian", "bookworm")["DIB_DISTRIBUTION_MIRROR"] == "http://mirror.example/debian"


def test_another_release_of_the_family_comes_from_the_same_mirror():
    here = host("deb http://mirror.example/debian bookworm main")
    assert apt.environment(here, "debian", "trixie")["DIB_DISTRIBUTION_MIRROR"] == "http://mirror.example/debian"


def test_an_image_of_another_family_is_left_to_the_defaults():
    assert apt.environment(host("deb http://mirror.example/debian bookworm main"), "ubuntu", "noble") == {}


def test_archives_that_a_chroot_cannot_reach_are_passed_over():
    here = host("deb file:/srv/debian bookworm main", "deb cdrom:[disc]/ bookworm main")
    assert apt.environment(here, "debian", "bookworm") == {}


def test_a_private_archives_key_is_handed_on():
    here = host("deb [signed-by=/etc/apt/keyrings/lab.gpg] http://mirror.example/debian bookworm main")
    assert apt.environment(here, "debian", "bookworm")["DIB_APT_KEYRING"] == "/etc/apt/keyrings/lab.gpg"


def test_a_mirror_behind_tls_brings_the_authorities_into_the_first_step():
    env = apt.environment(host("deb https://mirror.example/debian bookworm main"), "debian", "bookworm")
    assert env["DIB_DEBOOTSTRAP_EXTRA_ARGS"] == "--include=ca-certificates"


def test_apts_proxy_serves_the_build_and_its_exceptions_too():
    settings = apt.parse_settings(
        'Acquire "";\nAcquire::http::Proxy "http://proxy.example:3128";\nAcquire::http::Proxy::near.example "DIRECT";\n'
    )
    env = apt.environment(host("deb http://m.example/debian bookworm main", settings=settings), "debian", "bookworm")
    assert (env["http_proxy"], env["no_proxy"]) == ("http://proxy.example:3128", "near.example")


def test_expired_lists_are_accepted_where_this_machine_accepts_them():
    settings = apt.parse_settings('Acquire::Check-Valid-Until "false";\n')
    env = apt.environment(host("deb http://m.example/debian bookworm main", settings=settings), "debian", "bookworm")
    assert env["DIB_NODEPOOL_APT_CONF"] == 'Acquire::Check-Valid-Until "false";'


def test_the_machines_family_is_read_from_os_release(tmp_path):
    (tmp_path / "os-release").write_text('ID=debian\nVERSION_CODENAME="bookworm"\n')
    here = apt.read_host(tmp_path)
    assert (here.family, here.release) == ("debian", "bookworm")
