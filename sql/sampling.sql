-- Whether an impression is in a sample of its day: by its id alone, so the same in any order, engine and version.
CREATE OR REPLACE TEMP MACRO in_sample(id, rate) AS
    rate >= 1 OR ('0x' || md5('sample ' || id::VARCHAR)[:13])::UBIGINT / 4503599627370496 < rate; -- 13 hex digits: 2^52
