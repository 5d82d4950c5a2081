#!/bin/sh
# Secrets come as files; medseg and PostgreSQL's client read them from the environment. NAME_FILE names NAME's file.
set -eu
for name in MEDSEG_REVIEW_KEY PGPASSWORD; do
  eval "file=\${${name}_FILE:-}"
  if [ -n "$file" ]; then
    value=$(cat "$file")
    export "$name=$value"
  fi
done
exec "$@"
