package gate

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
)

// masker finds secrets in what comes back and overwrites them with asterisks,
// one for each byte, so that lengths stay true. It knows a value as it is, and
// as JSON, URLs and base64 write it; a host that encodes it in another way on
// purpose cannot be stopped, which is why only its own host ever gets it.
type masker struct {
	patterns [][]byte // longest first
	lower    []string // for names of headers, which change case on their way
}

// newMasker returns nil if there is nothing to look for.
func newMasker(values []string) *masker {
	m := &masker{}
	for _, v := range values {
		if len(v) < minSecret {
			continue
		}
		quoted, _ := json.Marshal(v) // a string always encodes
		for _, p := range []string{
			v, string(quoted[1 : len(quoted)-1]), strings.ReplaceAll(v, "/", `\/`),
			url.QueryEscape(v), url.PathEscape(v),
			base64.StdEncoding.EncodeToString([]byte(v)), base64.RawURLEncoding.EncodeToString([]byte(v)),
		} {
			m.patterns = append(m.patterns, []byte(p))
		}
		m.lower = append(m.lower, strings.ToLower(v))
	}
	slices.SortFunc(m.patterns, func(a, b []byte) int {
		if len(a) != len(b) {
			return len(b) - len(a)
		}
		return bytes.Compare(a, b)
	})
	m.patterns = slices.CompactFunc(m.patterns, bytes.Equal)
	if len(m.patterns) == 0 {
		return nil
	}
	return m
}

// mask overwrites what is found in b and tells if there was any.
func (m *masker) mask(b []byte) (found bool) {
	for _, p := range m.patterns {
		for rest := b; ; {
			i := bytes.Index(rest, p)
			if i < 0 {
				break
			}
			found = true
			for j := range p {
				rest[i+j] = '*'
			}
			rest = rest[i+len(p):]
		}
	}
	return found
}

// header masks values, and drops a header whose name holds a secret.
func (m *masker) header(h http.Header) (found bool) {
	for name, values := range h {
		low := strings.ToLower(name)
		if slices.ContainsFunc(m.lower, func(s string) bool { return strings.Contains(low, s) }) {
			delete(h, name)
			found = true
			continue
		}
		for i, v := range values {
			if b := []byte(v); m.mask(b) {
				values[i] = string(b)
				found = true
			}
		}
	}
	return found
}

// held is how many of b's last bytes may be the beginning of a secret, so that
// they have to wait for what follows.
func (m *masker) held(b []byte) int {
	most := 0
	for _, p := range m.patterns {
		for n := min(len(p)-1, len(b)); n > most; n-- {
			// The first byte sorts nearly all of them out.
			if b[len(b)-n] == p[0] && bytes.HasPrefix(p, b[len(b)-n:]) {
				most = n
				break
			}
		}
	}
	return most
}

// maskReader masks a stream. It holds back no more than what could be the
// beginning of a secret, so that events arrive when they are sent.
type maskReader struct {
	src   io.Reader
	m     *masker
	buf   []byte
	ready int // bytes of buf that may go out
	err   error
	found bool
}

func (r *maskReader) Read(p []byte) (int, error) {
	for r.ready == 0 && r.err == nil {
		at := len(r.buf)
		r.buf = slices.Grow(r.buf, len(p))[:at+len(p)]
		n, err := r.src.Read(r.buf[at:])
		r.buf = r.buf[:at+n]
		r.err = err
		r.found = r.m.mask(r.buf) || r.found
		r.ready = len(r.buf)
		if err == nil {
			r.ready -= r.m.held(r.buf)
		}
	}
	if r.ready == 0 {
		return 0, r.err
	}
	n := copy(p, r.buf[:r.ready])
	r.buf = r.buf[:copy(r.buf, r.buf[n:])]
	r.ready -= n
	return n, nil
}
