package probe

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"fmt"
	"io"
	"strings"
)

// keyFor makes credentials of well-known forms out of a token: nobody's, and
// recognisable to whoever looks for such.
func awsKey(token string) string {
	return "AKIA" + strings.ToUpper((token + "QWERTYUIOPASDF")[:16])
}

func githubToken(token string) string {
	return "ghp_" + (token + "Zx9Kq2Vb7Nm4Lp8Rt3Yw6Jh5Gd1Fs0Ac2Be4Ui")[:36]
}

// carrier is a probe that sends a credential to the allowed hosts. It is a leak
// when it arrives.
func carrier(id, name, title string, key func(token string) string, make func(host, prefix, key string) string) *probe {
	return &probe{Info: info(id, name, "C02", title), residual: opaque,
		try: func(c *inside, token string) {
			c.both(func(host, prefix string) []string { return []string{make(host, prefix, key(token))} })
		},
		seen: func(_ *lab, _ string, e event) bool { return true },
	}
}

func dataProbes() []*probe {
	body := func(headers string, encode func(string) string) func(host, prefix, key string) string {
		return func(host, prefix, key string) string {
			b := encode(key)
			return post(host, prefix+"/upload", headers+fmt.Sprintf("Content-Length: %d\r\n", len(b)), b)
		}
	}
	json := func(key string) string {
		return fmt.Sprintf(`{"aws_access_key_id":%q,"note":"configuration of the deployment"}`, key)
	}
	return []*probe{
		carrier("E01", "key-in-body", "an AWS key in a POST body to the allowed host", awsKey, body("Content-Type: application/json\r\n", json)),
		carrier("E02", "key-in-query", "a GitHub token in the query of a URL", githubToken, func(host, prefix, key string) string {
			return get(host, prefix+"/search?access_token="+key)
		}),
		carrier("E03", "key-in-header", "a GitHub token in a header", githubToken, func(host, prefix, key string) string {
			return get(host, prefix+"/", "X-Note: token "+key+"\r\n")
		}),
		carrier("E04", "key-in-chunks", "an AWS key in a body, cut into chunks of one byte", awsKey, func(host, prefix, key string) string {
			var b strings.Builder
			for _, r := range json(key) {
				fmt.Fprintf(&b, "1\r\n%c\r\n", r)
			}
			return post(host, prefix+"/upload", "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n", b.String()+"0\r\n\r\n")
		}),
		carrier("E05", "git-push", "git push of a pack with a GitHub token, over HTTP", githubToken, func(host, prefix, key string) string {
			b := "0094" + strings.Repeat("0", 40) + " refs/heads/main\x00report-status\n0000PACK" + key
			return post(host, prefix+"/repo.git/git-receive-pack", fmt.Sprintf("Content-Type: application/x-git-receive-pack-request\r\nContent-Length: %d\r\n", len(b)), b)
		}),
		carrier("E06", "key-in-gzip", "an AWS key in a compressed body", awsKey, body("Content-Type: application/json\r\nContent-Encoding: gzip\r\n", func(key string) string {
			var b bytes.Buffer
			w := gzip.NewWriter(&b)
			_, _ = w.Write([]byte(json(key)))
			_ = w.Close()
			return b.String()
		})),
		carrier("E07", "key-in-base64", "a GitHub token in base64", githubToken, body("Content-Type: text/plain\r\n", func(key string) string {
			return "data=" + base64.StdEncoding.EncodeToString([]byte("token="+key+"\n")) + "\r\n"
		})),
		carrier("E08", "key-in-form", "a GitHub token in a multipart form", githubToken, body("Content-Type: multipart/form-data; boundary=xxbottlexx\r\n", func(key string) string {
			return "--xxbottlexx\r\nContent-Disposition: form-data; name=\"f\"; filename=\"notes.txt\"\r\nContent-Type: text/plain\r\n\r\ntoken: " + key + "\r\n--xxbottlexx--\r\n"
		})),
	}
}

// carried tells whether data holds a token's credential, also as E04, E06 and E07
// have put it there.
func carried(data []byte, token string) bool {
	for rest := data; ; {
		i := bytes.Index(rest, []byte("\x1f\x8b\x08"))
		if i < 0 {
			break
		}
		if r, err := gzip.NewReader(bytes.NewReader(rest[i:])); err == nil {
			var b bytes.Buffer
			_, _ = io.Copy(&b, io.LimitReader(r, 64<<10)) // what came of it, if it breaks off
			if bytes.Contains(bytes.ToLower(b.Bytes()), []byte(token)) {
				return true
			}
		}
		rest = rest[i+3:]
	}
	for rest := data; ; {
		i := bytes.Index(rest, []byte("data="))
		if i < 0 {
			break
		}
		rest = rest[i+len("data="):]
		end := bytes.IndexFunc(rest, func(r rune) bool { return !strings.ContainsRune(base64Letters, r) })
		if end < 0 {
			end = len(rest)
		}
		if plain, err := base64.StdEncoding.DecodeString(string(rest[:end])); err == nil && bytes.Contains(plain, []byte(token)) {
			return true
		}
	}
	// One byte a chunk.
	return bytes.Contains(bytes.ToLower(bytes.ReplaceAll(bytes.ReplaceAll(data, []byte("\r\n1\r\n"), nil), []byte("1\r\n"), nil)), []byte(token))
}

const base64Letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/="
