use super::*;

fn all(text: &str) -> Result<(Vec<Record>, Ignored), TraceError> {
    let mut reader = TraceReader::new(text.as_bytes());
    let mut records = Vec::new();
    while let Some(record) = reader.next_record()? {
        records.push(record);
    }
    Ok((records, reader.ignored()))
}
