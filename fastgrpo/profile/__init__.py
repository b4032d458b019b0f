"""`fastgrpo profile`: whole training steps against another implementation, and where the time of both went."""
