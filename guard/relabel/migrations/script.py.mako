"""${message}"""

import sqlalchemy as sa
from alembic import op

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}


def upgrade() -> None:
    """Change the schema; `guard.relabel.schema` and its REVISION say the same afterwards."""
    ${upgrades if upgrades else "pass"}
