"""The domain: what jobs, uploads, downloads and files are and do. Knows no HTTP.

The records that it hands out are those of ``storage``; handlers take their names from here.
"""

from storage import By as By
from storage import Event as Event
from storage import File as File
from storage import Filter as Filter
from storage import Job as Job
from storage import Key as Key
from storage import Page as Page
from storage import Reader as Reader
from storage import matches_text as matches_text
