"""Session ids as file names, and back."""

from urllib.parse import unquote_to_bytes

from mal_adapter.errors import SessionError
from mal_adapter.stores.checks import id_bytes

__all__ = ["SUFFIX", "file_name", "session_id_of"]

SUFFIX = ".safetensors"
LONGEST = 255  # bytes of one name on ext4, XFS, APFS and NTFS

# No upper case: "Call" and "call" would be one file on macOS and Windows, and the second dialogue would read the first
# one's memory. No letter beyond ASCII: macOS may store é in another normal form than it was given.
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789-_.")


def file_name(session_id: str) -> str:
    """The name of a session's file: its id, percent-encoded where it could leave the folder, hide, or be confused.

    Raises:
        SessionError: The id is no non-empty string of Unicode, or its name would be too long for a file.

    Example:
        >>> file_name("room-7/Anna")
        'room-7%2F%41nna.safetensors'
        >>> file_name("..")
        '%2E..safetensors'
    """
    name = "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in id_bytes(session_id))
    if name.startswith("."):  # hidden files are temporaries and the lock
        name = "%2E" + name[1:]
    name += SUFFIX
    if len(name) > LONGEST:
        raise SessionError(
            f"session id {session_id[:32]!r}… of {len(session_id)} characters makes a file name of {len(name)} bytes, "
            f"and files allow {LONGEST}; letters other than a-z take 3 bytes or more. Use a shorter id, or its hash"
        )
    return name


def session_id_of(name: str) -> str | None:
    """The inverse of `file_name`; None for a file that is no session's.

    Example:
        >>> session_id_of("room-7%2F%41nna.safetensors")
        'room-7/Anna'
        >>> session_id_of("Notes.safetensors") is None
        True
    """
    try:
        session_id = unquote_to_bytes(name.removesuffix(SUFFIX)).decode()
        # a name with one more or one less letter encoded decodes too, but no session is kept under it
        return session_id if file_name(session_id) == name else None
    except (UnicodeError, SessionError):
        return None
